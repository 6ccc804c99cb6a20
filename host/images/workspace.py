"""Places in a store where images are made, and images held while they are used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from apppot.host.common import locks, paths
from apppot.host.common.errors import ImageError
from apppot.host.common.files import listdir

STALE_SECONDS = 3600.0


def user_store() -> str:
    """The store that is written to."""
    return paths.image_stores()[-1]


@contextmanager
def workspace() -> Iterator[str]:
    """A private directory inside the user's store, on the same file system as the blobs.

    Locked while it is in use and removed afterwards; what a crash left is swept by a later
    caller, by age and lock.
    """
    import shutil
    import tempfile

    root = os.path.join(user_store(), "tmp")
    make_directory(root)
    for directory in abandoned(STALE_SECONDS):
        shutil.rmtree(directory, ignore_errors=True)
    with locked(user_store()):  # `prune` must not come between the two
        directory = tempfile.mkdtemp(dir=root)
        lock = locks.acquire(os.path.join(directory, "lock"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def abandoned(age: float) -> Iterator[str]:
    """Workspaces untouched for `age` seconds whose owner does not live; locked while looked at."""
    import time

    root = os.path.join(user_store(), "tmp")
    for entry in listdir(root):
        directory = os.path.join(root, entry)
        try:
            if time.time() - os.stat(directory).st_mtime < age:
                continue
            lock = locks.try_acquire(os.path.join(directory, "lock"))
        except OSError:
            continue
        if lock is None:
            continue  # its owner lives
        try:
            yield directory
        finally:
            os.close(lock)


@contextmanager
def locked(store: str, *, exclusive: bool = False) -> Iterator[None]:
    """Hold the store's lock: shared while an image becomes visible, exclusive while one goes."""
    make_directory(store)
    with locks.held(os.path.join(store, "lock"), shared=not exclusive):
        yield


def hold(path: str) -> int:
    """A descriptor with a shared lock on an image file; it stays usable and in place.

    The lock goes with the descriptor, also by kill -9.  Raises ImageError where the image was
    removed since it was found.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(f"image {path!r} cannot be read: {error.strerror}") from None
        try:
            locks.lock(descriptor, shared=True)  # waits for no longer than a removal takes
        except OSError:
            return descriptor  # a file system without locks: the open file stays valid
        if locks.is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
        if not os.path.exists(path):
            raise ImageError(f"image {path!r} was removed just now", "apppot image list")


def make_directory(path: str) -> None:
    if os.path.isdir(path):
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ImageError(
            f"the image store {path} cannot be made: {error.strerror}",
            "set XDG_DATA_HOME to a directory that you can write to",
        ) from None
