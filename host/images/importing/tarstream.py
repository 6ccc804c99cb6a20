"""Reading archives of strangers: decompression, digests and members, forward only.

Compressed bytes come from a slice of a file (`Blob`), so that a layer inside a `docker save`
archive is read where it lies.  What a header claims is checked before memory is spent on it.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from apppot.host.common.errors import ApppotError, ImageError
from apppot.host.common.files import write_all
from apppot.host.common.frozen import frozen
from apppot.host.images import pack
from apppot.host.images.probe import tar_compression
from apppot.host.process import run

CHUNK = 1 << 20
BLOCK = 512
END_OF_TAR = bytes(1024)  # two zero blocks close every complete tar
# The longest header (a name, extended attributes) that is believed: Linux allows 64 KiB a value.
MAX_HEADER = 16 << 20
TRUNCATED_HINT = "copy or download the file again; this one is incomplete"
DAMAGED_HINT = "is it a whole, sound tar archive?"


@frozen
class Blob:
    """A tar, maybe compressed: `size` bytes of the file `path` from byte `offset`.

    `digest` ("sha256:…") is what these bytes must have, `content` what they must have when
    decompressed; None where nobody said.  `name` is for messages.  `whole` asks for the two
    zero blocks at the end, by which a cut-off archive without digests shows.
    """

    path: str
    size: int
    name: str
    offset: int = 0
    digest: str | None = None
    content: str | None = None
    whole: bool = True


class _Slice:
    """The blob's own bytes, hashed on the way."""

    def __init__(self, blob: Blob, descriptor: int, count: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._at, self._end = blob.offset, blob.offset + blob.size
        self._count = count
        self.hash = _hasher(blob.digest)

    def read(self, size: int = CHUNK) -> bytes:
        wanted = self._end - self._at
        if 0 < size < wanted:
            wanted = size
        data = os.pread(self._descriptor, min(wanted, CHUNK), self._at)
        self._at += len(data)
        if self.hash is not None:
            self.hash.update(data)
        self._count(len(data))
        return data


def _hasher(digest: str | None) -> Any:
    return None if digest is None else hashlib.new(digest.partition(":")[0])


def _check(name: str, digest: str | None, found: Any) -> None:
    if digest is not None and found.hexdigest() != digest.partition(":")[2]:
        raise ImageError(f"{name} is damaged: its digest is not {digest}", TRUNCATED_HINT)


class Stream:
    """The plain tar: what `tarfile` needs of a file, and `copy` for a member's data."""

    def __init__(self, read: Callable[[int], bytes], blob: Blob) -> None:
        self._read, self._blob = read, blob
        self._buffer, self._at = b"", 0  # bytes in hand, and how many of them are used
        self._start = 0  # position of the buffer in the stream
        self.hash = _hasher(blob.content)
        self.last_header = b""

    def tell(self) -> int:
        return self._start + self._at

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise ImageError(f"{self._blob.name} has a header of {size} bytes", DAMAGED_HINT)
        parts = []
        while size and (data := self._some(size)):
            parts.append(data)
            size -= len(data)
        whole = b"".join(parts)
        if len(whole) == BLOCK:
            self.last_header = whole
        return whole

    def seek(self, position: int) -> None:
        """Forward, or back by the one byte that tarfile looks at again."""
        if position == self.tell() - 1 and self._at:
            self._at -= 1
        while position > self.tell():
            if not self._some(min(position - self.tell(), CHUNK)):
                return  # the next read tells

    def copy(self, size: int, write: Callable[[bytes], None]) -> None:
        """Hand `size` bytes to `write`.  Raises ImageError when the tar ends before."""
        while size:
            data = self._some(min(size, CHUNK))
            if not data:
                raise ImageError(f"{self._blob.name} is truncated: it ends early", TRUNCATED_HINT)
            write(data)
            size -= len(data)

    def finish(self) -> None:
        """Read to the end; raises ImageError for a tar that is cut off or goes on as none."""
        if self.last_header.strip(b"\0"):
            raise ImageError(f"{self._blob.name} is damaged: no header", DAMAGED_HINT)
        tail = self._buffer[-len(END_OF_TAR) :]
        while data := self._fill():
            tail = (tail + data)[-len(END_OF_TAR) :]
        if self._blob.whole and tail != END_OF_TAR:
            raise ImageError(
                f"tar {self._blob.name} is truncated: its end is missing", TRUNCATED_HINT
            )
        _check(self._blob.name, self._blob.content, self.hash)

    def _some(self, size: int) -> bytes:
        if self._at == len(self._buffer) and not self._fill():
            return b""
        data = self._buffer[self._at : self._at + size]
        self._at += len(data)
        return data

    def _fill(self) -> bytes:
        # The last bytes stay: one for `seek`, the others for the check of the end.
        data = _read_or_explain(self._read, self._blob.name)
        kept = self._buffer[-len(END_OF_TAR) :]
        self._start += len(self._buffer) - len(kept)
        self._buffer, self._at = kept + data, len(kept)
        if self.hash is not None:
            self.hash.update(data)
        return data


def _read_or_explain(read: Callable[[int], bytes], name: str) -> bytes:
    try:
        return read(CHUNK)
    except EOFError:
        raise ImageError(
            f"{name} is truncated: the compressed data ends early", TRUNCATED_HINT
        ) from None
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ImageError(f"{name} is damaged: {error}", TRUNCATED_HINT) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise ImageError(f"{name} is damaged: {error}", TRUNCATED_HINT) from None


def _nothing(_: int) -> None:
    return


@contextmanager
def opened(blob: Blob, count: Callable[[int], None] = _nothing) -> Iterator[Stream]:
    """The blob's tar.  `count` hears how many compressed bytes were read.

    Leaving normally reads what is left and checks the digests.
    """
    descriptor = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(descriptor, min(BLOCK, blob.size), blob.offset)
        source = _Slice(blob, descriptor, count)
        with decompressed(source, tar_compression(head) or "plain") as plain:
            stream = Stream(plain.read, blob)
            yield stream
            stream.finish()
        source.read(-1)
        while source.read(-1):
            pass
        _check(blob.name, blob.digest, source.hash)
    finally:
        os.close(descriptor)


def members(stream: Stream, name: str) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, in order.  Raises ImageError for what is none."""
    try:
        source: Any = stream  # tarfile needs no more of a file than read, seek and tell
        archive = tarfile.open(
            fileobj=source, mode="r:", encoding="utf-8", errors="surrogateescape"
        )
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # else it keeps them all
            yield member
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if stream.tell() <= len(END_OF_TAR) and not stream.last_header.strip(b"\0"):
            return  # nothing but the end: an empty archive
        raise ImageError(f"{name} is damaged: {error}", DAMAGED_HINT) from None


@contextmanager
def decompressed(source: Any, compression: str) -> Iterator[Any]:
    """Something with read(size) that gives the plain bytes of `source`."""
    if compression == "gzip":
        with gzip.GzipFile(fileobj=source, mode="rb") as stream:
            yield stream
    elif compression == "xz":
        with lzma.LZMAFile(source) as stream:
            yield stream
    elif compression == "bzip2":
        with bz2.BZ2File(source) as stream:
            yield stream
    elif compression == "zstd":
        with _Zstd(source) as plain:
            yield plain
    else:
        yield source


class _Zstd:
    """The program zstd between two pipes: the standard library has none."""

    def __init__(self, source: Any) -> None:
        self._source = source
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
            while data := self._source.read(CHUNK):
                write_all(self._in_writer, data)
        except OSError:
            pass  # zstd is gone and says why, or the stream ends early and it says so
        finally:
            os.close(self._in_writer)

    def _run(self) -> None:
        try:
            run.run(
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
