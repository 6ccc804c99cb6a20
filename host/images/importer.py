"""Import a file as an image: a tar becomes squashfs on the way, a file system is copied.

Nothing is unpacked and nothing needs root.  The file stays as it was; an import that fails or is
killed leaves nothing in the store.
"""

from __future__ import annotations

import bz2
import errno
import fcntl
import gzip
import hashlib
import lzma
import os
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from apppot.host import process
from apppot.host.errors import ApppotError, ImageError, UsageError
from apppot.host.images import pack, store
from apppot.host.images.probe import (
    HEAD_BYTES,
    ImageFormat,
    Probed,
    probe,
    probe_descriptor,
    require_bootable,
    tar_compression,
)
from apppot.host.progress import Progress

STDIN = "-"
CHUNK = 1 << 20
END_OF_TAR = bytes(1024)  # two zero blocks close every complete tar
FICLONE = 0x40049409
SUFFIXES = re.compile(
    r"(\.(tar|tgz|txz|tbz2?|tzst|gz|xz|bz2|zst|squashfs|sqfs|sfs|erofs|ext[234]|img|raw))+$"
)
TRUNCATED_HINT = "copy or download the file again; this one is incomplete"
FULL_HINT = "make room, or set XDG_DATA_HOME to a larger disk"


@dataclass(frozen=True)
class Source:
    """What is imported: an open descriptor behind the bytes `head` already read from it, a name
    for messages, and what it was found to be (size 0: a pipe of unknown length)."""

    descriptor: int
    head: bytes
    name: str
    probed: Probed


def import_file(path: str, name: str = "", command: tuple[str, ...] = ()) -> store.Record:
    """Put the file at `path` ("-" is standard input) into the user's store.

    `name` is NAME[:VERSION]; without it the file's own name serves.  Raises ImageError for
    what is truncated, damaged or of no known kind, UsageError for a name that cannot be made.
    """
    label, version = _label(path, name)
    try:
        with store.workspace() as folder, _opened(path, folder) as source:
            image = os.path.join(folder, "image")
            kind, digest = _convert(source, image)
            record = store.Record(
                digest="",
                name=label,
                version=version,
                format=kind,
                size=0,
                distribution=pack.distribution(image) if kind is ImageFormat.SQUASHFS else "",
                description=f"imported from {pack.printable(os.path.basename(source.name))}",
                command=command,
            )
            return store.add(image, record, digest)
    except OSError as error:
        hint = FULL_HINT if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ImageError(f"importing {path!r} failed: {error.strerror}", hint) from None


def _label(path: str, name: str) -> tuple[str, str]:
    label, _, version = name.partition(":")
    if not label and path == STDIN:
        raise UsageError("an import from standard input needs a name", "--name NAME[:VERSION]")
    label = label or default_name(path)
    store.check_name(label, version or "1")
    return label, version or "1"


def default_name(path: str) -> str:
    """An image name made of a file's name: lower case, without its endings."""
    stem = SUFFIXES.sub("", os.path.basename(path).lower())
    return re.sub(r"[^a-z0-9._-]+", "-", stem).strip("._-")[: store.MAX_WORD] or "image"


@contextmanager
def _opened(path: str, folder: str) -> Iterator[Source]:
    """The file, or standard input: a tar is taken on the fly, all else needs a file first."""
    head, name = b"", path
    if path == STDIN:
        head, name = _read_fully(0, HEAD_BYTES), "standard input"
        compression = tar_compression(head)
        if compression:
            yield Source(0, head, name, Probed(ImageFormat.TAR, 0, compression))
            return
        path = _spool(0, head, os.path.join(folder, "stdin"))
    else:
        probe(path)  # explains what cannot even be opened
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Source(descriptor, b"", name, probe_descriptor(descriptor, name))
    finally:
        os.close(descriptor)


def _read_fully(descriptor: int, size: int) -> bytes:
    parts = b""
    while len(parts) < size and (data := os.read(descriptor, size - len(parts))):
        parts += data
    return parts


def _spool(descriptor: int, head: bytes, path: str) -> str:
    with open(path, "xb") as out:
        out.write(head)
        while data := os.read(descriptor, CHUNK):
            out.write(data)
    return path


def _convert(source: Source, image: str) -> tuple[ImageFormat, str | None]:
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
    if found is ImageFormat.SIF:
        raise ImageError(
            f"{source.name!r} is a .sif, which this version cannot import",
            "import the squashfs partition in it: singularity sif dump",
        )
    require_bootable(source.probed, source.name)
    return found, _copy(source, image)


# --- a tar ------------------------------------------------------------------------------------


class _Meter:
    """Reads the source's bytes and reports how far it is."""

    def __init__(self, source: Source, progress: Progress) -> None:
        self._source = source
        self._head = source.head
        self._progress = progress

    def read(self, size: int = CHUNK) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
        else:
            data = os.read(self._source.descriptor, size if size > 0 else CHUNK)
        self._progress.update(self._progress.done + len(data))
        return data


def _pack_tar(source: Source, image: str) -> None:
    title = f"importing {pack.printable(os.path.basename(source.name))}"
    try:
        with (
            Progress(title, source.probed.size) as progress,
            pack.Packer(image, 0, clamp=False) as packer,
            _decompressed(_Meter(source, progress), source.probed.detail) as stream,
        ):
            _feed(stream, packer, source.name)
    except process.ToolError as error:
        raise ImageError(
            f"{source.name!r} cannot be imported: {pack.printable(' '.join(error.cause.split()))}",
            error.hint if "not installed" in error.cause else "is it a whole, sound tar archive?",
        ) from None


def _feed(stream: Any, packer: pack.Packer, name: str) -> None:
    """Hand a tar to the packer and check that its end is there."""
    tail, open_end = b"", True
    while data := _read_or_explain(stream, name):
        tail = (tail + data)[-len(END_OF_TAR) :]
        if not open_end:
            continue
        try:
            pack.write_all(packer.writer, data)
        except BrokenPipeError:
            if packer.failed:
                raise
            open_end = False  # it has seen the end of the archive; padding follows
    if tail != END_OF_TAR:
        raise ImageError(f"tar {name!r} is truncated: its end is missing", TRUNCATED_HINT)


def _read_or_explain(stream: Any, name: str) -> bytes:
    try:
        data: bytes = stream.read(CHUNK)
    except EOFError:
        raise ImageError(
            f"{name!r} is truncated: the compressed data ends early", TRUNCATED_HINT
        ) from None
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ImageError(f"{name!r} is damaged: {error}", TRUNCATED_HINT) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ImageError(f"{name!r} is damaged: {error}", TRUNCATED_HINT) from None
    return data


@contextmanager
def _decompressed(meter: _Meter, compression: str) -> Iterator[Any]:
    """Something with read(size) that gives the plain tar."""
    raw: Any = meter  # the standard library needs no more of a file than read()
    if compression == "gzip":
        with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
            yield stream
    elif compression == "xz":
        with lzma.LZMAFile(raw) as stream:
            yield stream
    elif compression == "bzip2":
        with bz2.BZ2File(raw) as stream:
            yield stream
    elif compression == "zstd":
        with _Zstd(meter) as plain:
            yield plain
    else:
        yield raw


class _Zstd:
    """The program zstd between two pipes: the standard library has none."""

    def __init__(self, meter: _Meter) -> None:
        self._meter = meter
        self._failure: ApppotError | None = None
        self._in_reader, self._in_writer = os.pipe2(os.O_CLOEXEC)
        self._out_reader, self._out_writer = os.pipe2(os.O_CLOEXEC)
        self._threads = [
            threading.Thread(target=self._supply, daemon=True),
            threading.Thread(target=self._run, daemon=True),
        ]

    def __enter__(self) -> _Zstd:
        for thread in self._threads:
            thread.start()
        return self

    def read(self, size: int) -> bytes:
        data = os.read(self._out_reader, size)
        if not data:
            self._threads[1].join()
            if self._failure is not None:
                raise self._failure
        return data

    def __exit__(self, *_: object) -> None:
        # Closing our end ends zstd, which ends the supplier: also in the middle.
        os.close(self._out_reader)
        for thread in reversed(self._threads):
            thread.join()

    def _supply(self) -> None:
        try:
            while data := self._meter.read(CHUNK):
                pack.write_all(self._in_writer, data)
        except OSError:
            pass  # zstd is gone and says why, or the stream ends early and it says so
        finally:
            os.close(self._in_writer)

    def _run(self) -> None:
        try:
            process.run(
                ["zstd", "-dcq", "--long=31"],
                stdin=self._in_reader,
                stdout=self._out_writer,
                timeout=pack.TIMEOUT,
                hint="apt-get install zstd",
            )
        except ApppotError as error:
            self._failure = error
        finally:
            os.close(self._in_reader)
            os.close(self._out_writer)


# --- a file system ----------------------------------------------------------------------------


def _copy(source: Source, image: str) -> str:
    """Copy sparsely, or share the blocks where the file system can; returns the SHA-256."""
    digest = hashlib.sha256()
    title = f"importing {pack.printable(os.path.basename(source.name))}"
    with open(image, "xb", buffering=0) as out, Progress(title, source.probed.size) as progress:
        shared = _clone(source.descriptor, out.fileno())
        done = 0
        while data := os.pread(source.descriptor, CHUNK, done):
            digest.update(data)
            if not shared and data.count(0) != len(data):
                pack.pwrite_all(out.fileno(), data, done)
            done += len(data)
            progress.update(done)
        os.ftruncate(out.fileno(), done)
    return digest.hexdigest()


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False  # most file systems cannot
    return True
