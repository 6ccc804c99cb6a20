"""Content-defined chunks: cutting files, and knowing which chunks lie in this host's images.

A chunk ends where the data itself says so (FastCDC), so what two versions share is found again
even where everything has moved.  The parameters are part of the format: with others, nothing
would be shared with what is published already.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from apppot.host.common import paths
from apppot.host.common.errors import RepositoryError
from apppot.host.common.files import write_atomic
from apppot.host.images import store
from apppot.host.images.record import Record

# Measured on a Debian 12 image with OpenSSL updated: 16 KiB re-fetches 8.1 %, 32 KiB 9.2 %,
# 64 KiB 12.2 % of the image; each halving doubles maps and work per byte.
AVERAGE = 32 << 10
LONGEST = 128 << 10
CACHE_SCHEMA = 1
# Chunking a local image costs about a second per GiB: not worth it for much more than the wish.
LOCAL_FACTOR = 4
LOCAL_FLOOR = 1 << 30


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk of a file on this host: where it starts there, and its bytes."""

    offset: int
    data: memoryview


def cut(path: str) -> Iterator[Piece]:
    """The chunks of a file, in order.  Raises OSError."""
    from pyfastcdc import FastCDC

    cutter = FastCDC(AVERAGE, min_size=AVERAGE // 4, max_size=LONGEST)
    for chunk in cutter.cut_file(path):
        yield Piece(chunk.offset, chunk.data)


# --- what this host has ------------------------------------------------------------------------


class Local:
    """Chunks that images of this host's stores hold: by digest, a file and an offset."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, int, int]] = {}
        self._open: dict[str, int] = {}

    def add(self, path: str, rows: list[tuple[str, int]]) -> None:
        """Enter an image by its (digest, length) rows."""
        offset = 0
        for digest, length in rows:
            self._places.setdefault(digest, (path, offset, length))
            offset += length

    def __contains__(self, digest: str) -> bool:
        return digest in self._places

    def read(self, digest: str) -> bytes | None:
        """The chunk's bytes, verified; None where the image no longer holds them."""
        path, offset, length = self._places[digest]
        try:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            data = os.pread(self._open[path], length, offset)
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == digest else None

    def close(self) -> None:
        """Let go of the files."""
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()


def local_chunks(name: str, parent: str, size: int) -> Local:
    """What this host's images can contribute to an image of that name, parent and size.

    Images whose chunks are known cost nothing; others are cut once, the likeliest first (same
    name, then the parent, then the newest), within a budget that grows with `size`.
    """
    local = Local()
    budget = max(LOCAL_FLOOR, LOCAL_FACTOR * size)
    for place, record in _candidates(name, parent):
        path = store.blob_path(place, record)
        rows = read_rows(record.digest)
        if rows is None and record.size <= budget:
            budget -= record.size
            rows = _cut_rows(path, record.digest)
        if rows is not None:
            local.add(path, rows)
    return local


def _candidates(name: str, parent: str) -> list[tuple[str, Record]]:
    unique = {record.digest: (place, record) for place, record in store.list_images()}
    rows = sorted(unique.values(), key=lambda row: row[1].created, reverse=True)
    return sorted(rows, key=lambda row: (row[1].name != name, row[1].digest != parent))


def _cut_rows(path: str, digest: str) -> list[tuple[str, int]] | None:
    try:
        rows = [(hashlib.sha256(piece.data).hexdigest(), len(piece.data)) for piece in cut(path)]
    except (OSError, ValueError):
        return None  # it only would have saved time
    write_rows(digest, rows)
    return rows


def _cache_path(digest: str) -> str:
    return os.path.join(paths.cache_home(), "chunks", f"{digest}.json")


def read_rows(digest: str) -> list[tuple[str, int]] | None:
    """The remembered (digest, length) rows of an image; None where there are none.

    A cache: damage means only that the image is cut again.
    """
    try:
        with open(_cache_path(digest), "rb") as handle:
            data = json.load(handle)
        if data["schema"] != CACHE_SCHEMA or data["average"] != AVERAGE:
            return None
        return [(str(name), int(length)) for name, length in data["chunks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_rows(digest: str, rows: list[tuple[str, int]]) -> None:
    """Remember an image's rows; a cache that cannot be written is no failure."""
    data = {"schema": CACHE_SCHEMA, "average": AVERAGE, "chunks": rows}
    try:
        text = json.dumps(data, separators=(",", ":"))
        write_atomic(_cache_path(digest), text.encode())
    except OSError:
        pass


# --- how a chunk is stored ---------------------------------------------------------------------

# Blocks of squashfs are compressed already: what saves less is left as it is.
WORTH = 0.95


class Packing:
    """Compresses what is worth it.  One per thread."""

    def __init__(self) -> None:
        import zstandard

        self._compressor = zstandard.ZstdCompressor(level=9)

    def pack(self, data: bytes | memoryview) -> bytes | memoryview:
        """A zstd frame where that is worth it, else the data itself."""
        packed = self._compressor.compress(data)
        return packed if len(packed) < WORTH * len(data) else data


class Unpacking:
    """Turns stored bytes back into a verified chunk.  One per thread."""

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard
        self._decompressor = zstandard.ZstdDecompressor()

    def unpack(self, stored: bytes, digest: str, length: int) -> bytes:
        """The chunk's bytes.  Raises RepositoryError where they are not what was published."""
        data = stored if len(stored) == length else self._inflate(stored, length)
        if len(data) != length or hashlib.sha256(data).hexdigest() != digest:
            raise Corrupted(digest)
        return data

    def _inflate(self, stored: bytes, length: int) -> bytes:
        # zstd allocates what the frame's header claims: a bomb is refused before.
        try:
            if self._zstd.frame_content_size(stored) != length:
                return b""
            data: bytes = self._decompressor.decompress(stored)
        except (self._zstd.ZstdError, MemoryError):
            return b""
        return data


class Corrupted(RepositoryError):
    """A chunk's bytes are not what its digest says."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"chunk {digest[:12]} is corrupted", "another mirror may have it whole")
