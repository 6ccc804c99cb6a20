"""Locks of files (flock): the kernel's, whatever the PID namespace, and gone with their holder.

A lock belongs to an open file: it goes when the descriptor is closed, however its process ends.
Every function raises OSError where a file cannot be opened, or its file system has no locks.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

# How a lock file is opened: NFS gives an exclusive lock only to who could write.
FLAGS = os.O_RDWR | os.O_CREAT


def lock(descriptor: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file; False where another's lock forbids it, and we do not wait."""
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(descriptor: int, path: str) -> bool:
    """Whether `path` names the open file: not what was put there since, nor nothing."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def acquire(path: str, *, shared: bool = False, flags: int = FLAGS, mode: int = 0o600) -> int:
    """A descriptor that holds the lock of the file at `path`, after waiting for it."""
    descriptor = _acquire(path, shared, True, flags, mode)
    assert descriptor is not None
    return descriptor


def try_acquire(
    path: str, *, shared: bool = False, flags: int = FLAGS, mode: int = 0o600
) -> int | None:
    """As `acquire`, without waiting; None where another holds it."""
    return _acquire(path, shared, False, flags, mode)


def _acquire(path: str, shared: bool, wait: bool, flags: int, mode: int) -> int | None:
    while True:
        descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
        try:
            locked = lock(descriptor, shared=shared, wait=wait)
            # Between opening and locking, its holder may have removed the file: nobody else
            # would meet a lock on that.
            if locked and is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not locked:
            return None


@contextmanager
def held(path: str, *, shared: bool = False, mode: int = 0o600) -> Iterator[None]:
    """Hold the lock file `path`, made with `mode` where it is missing; waits for it."""
    descriptor = acquire(path, shared=shared, mode=mode)
    try:
        yield
    finally:
        os.close(descriptor)


def is_held(path: str) -> bool:
    """Whether somebody holds the file at `path` exclusively.  Asking hinders nobody who asks."""
    descriptor = try_acquire(path, shared=True, flags=os.O_RDONLY)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None
