"""Reading a tar archive of a stranger, forward only: plain, gzip, bzip2 or xz.

GNU tar's incremental archives among them, as the original AppPot's `apppot-snap` wrote changes:
a directory there has a list of what was in it (`listing`), in the member's data (GNU format) or
in an extended header (pax).  Off the boot path: imports freely.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from typing import Any

CHUNK = 1 << 20
# The longest list of a directory, or other header, that is believed: half a million names.
MOST_HEADER = 64 << 20
DUMP_DIRECTORY = b"D"
_GNU_MAGIC = b"ustar  \0"
# In GNU headers, the times of access and change; tarfile takes them for part of the name.
_TIMES = slice(345, 369)
# What file systems can hold, in seconds: 1901 to 2446.
_FIRST, _LAST = -(1 << 31), (14 << 30) - 1
_END = bytes(1024)  # two zero blocks close every complete archive
_OPENERS: tuple[tuple[bytes, Any], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\0", lzma.open),
)


Member = tarfile.TarInfo


class Damaged(ValueError):
    """The archive cannot be read, or asks for what cannot be done."""


def _without_times(header: bytes) -> bytes:
    if header[257:265] != _GNU_MAGIC or not _sum_holds(header):
        return header
    header = header[: _TIMES.start] + bytes(_TIMES.stop - _TIMES.start) + header[_TIMES.stop :]
    return header[:148] + b"%06o\0 " % _sum(header) + header[156:]


def _sum(header: bytes) -> int:
    return sum(header[:148]) + 8 * 0x20 + sum(header[156:])


def _sum_holds(header: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return int(header[148:156].strip(b" \0"), 8) == _sum(header)
    return False


class _Stream:
    """The decompressed bytes, forward only: what tarfile needs of a file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._at = 0
        self._tail = b""
        self.last_header = b""

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end; a header comes without GNU's extra times."""
        if size > MOST_HEADER:
            raise Damaged(f"the archive has a header of {size} bytes")
        parts = []
        while size and (data := self._some(size)):
            parts.append(data)
            size -= len(data)
        whole = b"".join(parts)
        if len(whole) == tarfile.BLOCKSIZE:
            self.last_header = whole = _without_times(whole)
        return whole

    def seek(self, position: int) -> None:
        if position < self._at:
            raise Damaged("the archive is damaged: its members overlap")
        while position > self._at and self._some(min(position - self._at, CHUNK)):
            pass

    def finish(self) -> None:
        """Read to the end.  Raises Damaged where the archive ends without its mark."""
        if any(self.last_header):
            raise Damaged("the archive is damaged: no header where one should be")
        while self._some(CHUNK):
            pass
        if self._tail != _END:
            raise Damaged("the archive is cut off: its end is missing")

    def _some(self, size: int) -> bytes:
        try:
            data: bytes = self._file.read(min(size, CHUNK))
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            raise Damaged(f"the archive is damaged or cut off: {error}") from None
        self._at += len(data)
        self._tail = (self._tail + data)[-len(_END) :]
        return data


class Archive:
    """The members of an open archive, in order, each with its data while it is the last one."""

    def __init__(self, file: Any) -> None:
        self._stream = _Stream(file)

    def members(self) -> Iterator[Member]:
        """Raises Damaged for what is damaged or cut off."""
        source: Any = self._stream
        try:
            tar = tarfile.open(
                fileobj=source, mode="r:", encoding="utf-8", errors="surrogateescape"
            )
            while (member := tar.next()) is not None:
                vars(tar)["members"].clear()  # else it keeps them all
                yield member
        except (tarfile.TarError, OverflowError) as error:
            raise Damaged(f"the archive is damaged: {error}") from None
        self._stream.finish()

    def data(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes of the last member's data."""
        while size:
            piece = self._stream.read(min(size, CHUNK))
            if not piece:
                raise Damaged("the archive is cut off: it ends in the middle of a file")
            yield piece
            size -= len(piece)

    def listing(self, member: Member) -> list[tuple[str, str]] | None:
        """(kind, name) of each entry in a directory's list; None for what has no list.

        Kinds: Y in the archive, N not, D directory, R renamed from and T to, X where to park.
        """
        if member.type == DUMP_DIRECTORY:
            if member.size > MOST_HEADER:
                raise Damaged(f"the list of {member.name!a} has {member.size} bytes")
            raw = b"".join(self.data(member.size))
        elif "GNU.dumpdir" in member.pax_headers:
            raw = member.pax_headers["GNU.dumpdir"].encode("utf-8", "surrogateescape")
        else:
            return None
        # An empty name ends the list; in front of it, R and T may have empty ones themselves.
        text = raw.decode("utf-8", "surrogateescape")
        return [(entry[0], entry[1:]) for entry in text.split("\0") if entry]


@contextlib.contextmanager
def opened(path: str) -> Iterator[Archive]:
    """The archive at `path`, decompressed on the way."""
    with open(path, "rb") as file:
        magic = file.read(6)
    opener: Any = next((opener for start, opener in _OPENERS if magic.startswith(start)), open)
    with opener(path, "rb") as file:
        yield Archive(file)


def modified_ns(member: Member) -> tuple[int, bool]:
    """When the member was modified, in nanoseconds since 1970; whether the archive knew these."""
    text = member.pax_headers.get("mtime")
    try:
        with localcontext(Context(prec=40, rounding=ROUND_FLOOR)):
            exact = Decimal(int(member.mtime) if text is None else text) * 10**9
            seconds, rest = divmod(int(exact.to_integral_value()), 10**9)
    except (ArithmeticError, ValueError):
        raise Damaged(f"{member.name!a} has an impossible time") from None
    return max(_FIRST, min(seconds, _LAST)) * 10**9 + rest, text is not None
