"""Import a file as an image: a tar becomes squashfs on the way, a file system is copied.

Nothing is unpacked and nothing needs root.  The file stays as it was; an import that fails or is
killed leaves nothing in the store.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from apppot.host.common.errors import ImageError, UsageError
from apppot.host.common.files import pwrite_all
from apppot.host.common.frozen import frozen
from apppot.host.common.progress import Progress
from apppot.host.common.text import printable
from apppot.host.images import pack, store
from apppot.host.images.importing import merge, tarstream
from apppot.host.images.probe import (
    ImageFormat,
    Probed,
    probe,
    probe_descriptor,
    require_bootable,
)
from apppot.host.images.record import MAX_WORD, RESERVED_NAMES, Record, check_name
from apppot.host.images.workspace import workspace

STDIN = "-"
CHUNK = 1 << 20
FICLONE = 0x40049409
SUFFIXES = re.compile(
    r"(\.(tar|tgz|txz|tbz2?|tzst|gz|xz|bz2|zst|squashfs|sqfs|sfs|erofs|ext[234]|img|raw))+$"
)
FULL_HINT = "make room, or set XDG_DATA_HOME to a larger disk"


@frozen
class ImportSource:
    """What is imported: an open descriptor, the file's path, a name for messages, and what it
    was found to be."""

    descriptor: int
    path: str
    name: str
    probed: Probed


def import_file(
    path: str, name: str = "", command: tuple[str, ...] = (), *, force: bool = False
) -> Record:
    """Put the file at `path` ("-" is standard input) into the user's store.

    `name` is NAME[:VERSION]; without it the file's own name serves.  Raises ImageError for
    what is truncated, damaged or of no known kind, or where the name belongs to other content
    and `force` does not say that it shall move; UsageError for a name that cannot be made.
    """
    label, version = _label(path, name)
    with explained(path), workspace() as folder, _opened(path, folder) as source:
        image = os.path.join(folder, "image")
        kind, digest = _convert(source, image)
        record = Record(
            digest="",
            name=label,
            version=version,
            format=kind,
            size=0,
            distribution=pack.distribution(image) if kind is ImageFormat.SQUASHFS else "",
            description=f"imported from {printable(os.path.basename(source.name))}",
            command=command,
        )
        return store.add(image, record, digest, move=force)


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns what the operating system has against the import of `path` into an ImageError."""
    try:
        yield
    except OSError as error:
        hint = FULL_HINT if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ImageError(f"importing {path!r} failed: {error.strerror}", hint) from None


def _label(path: str, name: str) -> tuple[str, str]:
    label, _, version = name.partition(":")
    if not label and path == STDIN:
        raise UsageError("an import from standard input needs a name", "--name NAME[:VERSION]")
    label = label or default_name(path)
    check_name(label, version or "1")
    return label, version or "1"


def default_name(path: str) -> str:
    """An image name made of a file's name: lower case, without its endings."""
    stem = SUFFIXES.sub("", os.path.basename(path).lower())
    name = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("._-")[:MAX_WORD] or "image"
    return f"{name}-image" if name in RESERVED_NAMES else name


@contextmanager
def _opened(path: str, folder: str) -> Iterator[ImportSource]:
    """The file, or standard input, which becomes one first: it is read twice."""
    name = path
    if path == STDIN:
        name = "standard input"
        path = _spool(0, os.path.join(folder, "stdin"))
    else:
        probe(path)  # explains what cannot even be opened
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield ImportSource(descriptor, path, name, probe_descriptor(descriptor, name))
    finally:
        os.close(descriptor)


def _spool(descriptor: int, path: str) -> str:
    with open(path, "xb") as out:
        while data := os.read(descriptor, CHUNK):
            out.write(data)
    return path


def _convert(source: ImportSource, image: str) -> tuple[ImageFormat, str | None]:
    """Write the image file; returns its format and, where it was computed on the way, digest."""
    found = source.probed.format
    if found is ImageFormat.TAR:
        _pack_tar(source, image)
        return ImageFormat.SQUASHFS, None
    if found is ImageFormat.COW:
        raise ImageError(
            f"{source.name!r} is a COW file: worthless without {source.probed.backing!r}",
            "run it as COW:IMAGE, or merge it first: uml_moo",
        )
    require_bootable(source.probed, source.name)
    if found is ImageFormat.SIF:
        return ImageFormat.SQUASHFS, _copy(source, image)
    return found, _copy(source, image)


# --- a tar ------------------------------------------------------------------------------------


def _pack_tar(source: ImportSource, image: str) -> None:
    title = f"importing {printable(os.path.basename(source.name))}"
    blob = tarstream.Blob(source.path, source.probed.size, repr(source.name))
    merge.merge([blob], image, title, whiteouts=False)


# --- a file system ----------------------------------------------------------------------------


def _copy(source: ImportSource, image: str) -> str:
    """Copy sparsely, or share the blocks where the file system can; returns the SHA-256.

    Of a .sif only its squashfs partition.
    """
    digest = hashlib.sha256()
    probed = source.probed
    start, end = 0, probed.size
    if probed.format is ImageFormat.SIF:
        start, end = probed.offset, probed.offset + probed.length
    title = f"importing {printable(os.path.basename(source.name))}"
    with open(image, "xb", buffering=0) as out, Progress(title, end - start) as progress:
        shared = start == 0 and _clone(source.descriptor, out.fileno())
        at = start
        while data := os.pread(source.descriptor, min(CHUNK, end - at), at):
            digest.update(data)
            if not shared and data.count(0) != len(data):
                pwrite_all(out.fileno(), data, at - start)
            at += len(data)
            progress.update(at - start)
        os.ftruncate(out.fileno(), at - start)
    return digest.hexdigest()


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False  # most file systems cannot
    return True
