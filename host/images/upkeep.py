"""Removing, checking and renaming what the user's store has.

Removal goes from the name to the file, so that a crash leaves at worst what `prune` finds.  An
image that a virtual machine uses loses its names at once and its file at the next `prune`.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from apppot.host.common import locks
from apppot.host.common.errors import ImageError, UsageError
from apppot.host.common.frozen import frozen
from apppot.host.common.progress import Progress
from apppot.host.images import store as images
from apppot.host.images.record import LATEST, Record, check_name, valid_name
from apppot.host.images.resolve import find, resolve
from apppot.host.images.workspace import abandoned, locked, user_store, workspace

CHUNK = 1 << 20
BLOCK = 512


@frozen
class Removed:
    """What a removal did: the names that went, bytes of disk freed, images still in use."""

    names: tuple[str, ...] = ()
    freed: int = 0
    kept: tuple[str, ...] = ()


@frozen
class Size:
    """Disk space of one name, in bytes: `unique` goes with it, `shared` other names have too."""

    unique: int
    shared: int


def remove(references: Sequence[str]) -> Removed:
    """Take names (name[:version], all versions with name:*) or digests out of the user's store.

    The file goes with its last name.  Raises ImageError for what is not there, before anything
    is removed.
    """
    store = user_store()
    with locked(store, exclusive=True):
        pairs = [pair for reference in references for pair in _find(store, reference)]
        digests = {digest for _, _, digest in pairs}
        names = dict.fromkeys((name, version) for name, version, _ in pairs if name)
        for name, version in names:
            _remove_name(store, name, version)
        done = [_remove_content(store, digest) for digest in sorted(digests)]
    freed, kept = _summed(done)
    return Removed(tuple(f"{name}:{version}" for name, version in names), freed, kept)


def _find(store: str, reference: str) -> list[tuple[str, str, str]]:
    """(name, version, digest) of all that `reference` means; name "" where it has none."""
    name, _, version = reference.partition(":")
    there = images.versions(store, name) if valid_name(name) else []
    if there:
        chosen = _chosen(store, name, version, there)
        return [(name, word, _digest_of(store, name, word)) for word in chosen]
    image = resolve(reference)
    if image.digest is None or not image.path.startswith(store):
        raise ImageError(f"{reference!r} is not in your store", "apppot image list")
    pairs = images.names_of(store, image.digest)
    return [(*pair, image.digest) for pair in pairs] or [("", "", image.digest)]


def _chosen(store: str, name: str, version: str, there: list[str]) -> list[str]:
    if version == "*":
        return there
    if version in there:
        return [version]
    if version in ("", LATEST) and len(there) == 1:
        return there
    listed = ", ".join(f"{name}:{word}" for word in there)
    raise ImageError(f"{name!r} has the versions {listed}", f"name one, or all: {name}:*")


def _digest_of(store: str, name: str, version: str) -> str:
    record = images.named_record(store, name, version)
    return record.digest if record is not None else ""


def _remove_name(store: str, name: str, version: str) -> None:
    """Remove a name.  `latest` first, so that it never points to what is gone."""
    rest = [images.named_record(store, name, word) for word in images.versions(store, name)]
    others = [record for record in rest if record is not None and record.version != version]
    latest = images.name_path(store, name, LATEST)
    if others:
        newest = max(others, key=lambda record: (record.created, record.version))
        images.write_name(store, newest)
    else:
        _unlink(latest)
    _unlink(images.name_path(store, name, version))
    try:
        os.rmdir(os.path.dirname(latest))
    except OSError:
        pass  # other versions


def _remove_content(store: str, digest: str) -> tuple[int, str]:
    """Remove a content without names; (bytes freed, "" or what keeps it)."""
    record = images.read_record(store, digest) if digest else None
    if record is None or images.names_of(store, digest):
        return 0, ""
    path = images.blob_path(store, record)
    with unused(path) as free:
        if not free:
            return 0, f"{record.name} ({digest[:12]})"
        freed = disk_size(path)
        _unlink(os.path.join(store, "records", f"{digest}.json"))
        _unlink(path)
    return freed, ""


def _summed(done: Sequence[tuple[int, str]]) -> tuple[int, tuple[str, ...]]:
    return sum(freed for freed, _ in done), tuple(kept for _, kept in done if kept)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


@contextmanager
def unused(path: str) -> Iterator[bool]:
    """Whether nobody uses the image file; if so, nobody begins to while the context lasts.

    Sees users on other hosts of a shared file system as well, where that has locks (NFS has).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield True  # there is none
        return
    try:
        yield _lock(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: str) -> bool:
    try:
        return locks.lock(descriptor, wait=False)
    except OSError as error:
        if error.errno != errno.EBADF:
            return True  # no locks here: an open file stays valid
        return _lock_for_writing(descriptor, path)


def _lock_for_writing(descriptor: int, path: str) -> bool:
    """NFS locks a file exclusively only for who could write to it."""
    os.chmod(path, 0o644)
    try:
        writable = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    finally:
        os.chmod(path, 0o444)
    os.dup2(writable, descriptor, inheritable=False)
    os.close(writable)
    try:
        return locks.lock(descriptor, wait=False)
    except OSError:
        return True


def disk_size(path: str) -> int:
    """Bytes that the file takes on the disk, 0 where it is gone."""
    try:
        return os.stat(path).st_blocks * BLOCK
    except OSError:
        return 0


def prune() -> Removed:
    """Remove what has no name any more, and what crashes have left; not what is in use."""
    store = user_store()
    with locked(store, exclusive=True):
        named = {record.digest for _, record in _named(store)}
        bare = [digest for digest in digests_in(store) if digest not in named]
        done = [_remove_content(store, digest) for digest in bare]
        done += [_remove_file(path) for path in _leftovers(store)]
        done += [_remove_workspace(path) for path in abandoned(0.0)]
    freed, kept = _summed(done)
    return Removed((), freed, kept)


def _named(store: str) -> list[tuple[str, Record]]:
    return [row for row in images.list_images() if row[0] == store and row[1].version]


def digests_in(store: str) -> list[str]:
    names = _entries(os.path.join(store, "records"))
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _leftovers(store: str) -> Iterator[str]:
    """Files without a record, notes of builds whose image is gone, half-written files."""
    known = set(digests_in(store))
    for name in _entries(os.path.join(store, "blobs")):
        if name.partition(".")[0] not in known:
            yield os.path.join(store, "blobs", name)
    for name in _entries(os.path.join(store, "builds")):
        path = os.path.join(store, "builds", name)
        if images.read_digest(path) not in known:
            yield path
    for folder, _, files in os.walk(store):
        if os.path.basename(folder) != "tmp":
            yield from (os.path.join(folder, name) for name in files if name.endswith(".partial"))


def _remove_file(path: str) -> tuple[int, str]:
    with unused(path) as free:
        if not free:
            return 0, os.path.basename(path)
        freed = disk_size(path)
        _unlink(path)
    return freed, ""


def _remove_workspace(folder: str) -> tuple[int, str]:
    freed = sum(disk_size(os.path.join(folder, name)) for name in _entries(folder))
    shutil.rmtree(folder, ignore_errors=True)
    return freed, ""


def verify(references: Sequence[str]) -> list[tuple[str, str]]:
    """(image, problem) of each image whose file is not what its digest says; all without names.

    Raises ImageError for a name that is not there.
    """
    problems = []
    for label, path, record in _to_verify(references):
        problem = _problem(label, path, record)
        if problem:
            problems.append((label, problem))
    return problems


def _to_verify(references: Sequence[str]) -> Iterator[tuple[str, str, Record]]:
    if references:
        for reference in references:
            image = find(reference)
            if image is None:
                raise ImageError(f"{reference!r} is not in a store", "apppot image list")
            yield reference, *image
        return
    seen = set()
    for store, record in images.list_images():
        if (store, record.digest) not in seen:
            seen.add((store, record.digest))
            yield f"{record.name}:{record.version}", images.blob_path(store, record), record


def _problem(label: str, path: str, record: Record) -> str:
    import hashlib

    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file, Progress(f"verifying {label}", record.size) as progress:
            while data := file.read(CHUNK):
                digest.update(data)
                progress.update(progress.done + len(data))
    except OSError as error:
        return f"{path}: {error.strerror}"
    if digest.hexdigest() != record.digest:
        return f"{path} is damaged: its digest is {digest.hexdigest()[:12]}…"
    return ""


def tag(reference: str, name: str, *, force: bool = False) -> Record:
    """Give an image a further name NAME[:VERSION]; one of the site's store is copied first.

    Raises ImageError where the name is another image's and `force` does not move it.
    """
    image = resolve(reference)
    if image.record is None:
        raise UsageError(f"{reference!r} is a file", "apppot image import puts it into the store")
    label, _, version = name.partition(":")
    record = replace(image.record, name=label, version=version or image.record.version)
    check_name(record.name, record.version)
    store = user_store()
    if image.path.startswith(os.path.join(store, "")):
        with locked(store):
            if not force:
                images.check_free(store, record.name, record.version, record.digest)
            images.write_name(store, record)
        return record
    with workspace() as folder:
        copy = os.path.join(folder, "image")
        shutil.copyfile(image.path, copy)
        return images.add(copy, record, move=force)


def sizes() -> dict[tuple[str, str, str], Size]:
    """Disk space by (store, name, version)."""
    rows = images.list_images()
    users: dict[tuple[str, str], int] = {}
    for store, record in rows:
        users[store, record.digest] = users.get((store, record.digest), 0) + 1
    found = {}
    for store, record in rows:
        size = disk_size(images.blob_path(store, record))
        shared = users[store, record.digest] > 1
        found[store, record.name, record.version] = Size(0 if shared else size, size * shared)
    return found


def total() -> int:
    """Bytes of disk that all images take, each content once."""
    contents = {images.blob_path(store, record) for store, record in images.list_images()}
    return sum(disk_size(path) for path in contents)


__all__ = ["Removed", "prune", "remove", "sizes", "tag", "total", "verify"]
