"""GNU tar's incremental archives, as the original AppPot's `apppot-snap` wrote changes.

Their directories carry a list of what was in them, which nothing but GNU tar understands.  Here
they become plain directories.  What the list says by leaving a name out, that a file was
removed, is not read yet.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from io import BufferedIOBase

from apppot.host.errors import ImageError

BLOCK = 512
GNU_MAGIC = b"ustar  \0"
DUMP_DIRECTORY, DIRECTORY = b"D", b"5"
# Members that hold no file: a volume's label, and a file's rest from another volume.
DROPPED = (b"V", b"M")
# In GNU headers, the times of access and change; others would take them for part of the name.
TIMES = slice(345, 369)


def open_tar(path: str) -> BufferedIOBase:
    """The tar at `path`, decompressed where the standard library can."""
    with open(path, "rb") as file:
        magic = file.read(2)
    match magic:
        case b"\x1f\x8b":
            return gzip.open(path, "rb")
        case b"BZ":
            return bz2.open(path, "rb")
        case b"\xfd7":
            return lzma.open(path, "rb")
        case _:
            return open(path, "rb")


def is_incremental(path: str) -> bool:
    """Whether the archive is one of GNU tar's incremental ones: its first member says so."""
    try:
        with open_tar(path) as tar:
            return _is_dump_directory(tar.read(BLOCK))
    except (OSError, EOFError, lzma.LZMAError):
        return False  # whoever imports it says what is wrong


def _is_dump_directory(header: bytes) -> bool:
    return header[156:157] == DUMP_DIRECTORY and header[257:265] == GNU_MAGIC


def write_plain(path: str, target: str) -> None:
    """Write the archive at `path` to `target` as a plain tar.  Raises ImageError."""
    try:
        with open_tar(path) as tar, open(target, "xb") as out:
            while len(header := tar.read(BLOCK)) == BLOCK and any(header):
                _member(header, tar, out)
            out.write(bytes(2 * BLOCK))
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise ImageError(f"{path} cannot be read: {error}", "is it a whole tar archive?") from None


def _member(header: bytes, tar: BufferedIOBase, out: BufferedIOBase) -> None:
    size, kind = number(header[124:136]), header[156:157]
    keep = kind not in (DUMP_DIRECTORY, *DROPPED)
    if kind == DUMP_DIRECTORY:
        header = header[:124] + b"00000000000\0" + header[136:156] + DIRECTORY + header[157:]
    if kind not in DROPPED:
        out.write(_signed(header))
    left = -(-size // BLOCK) * BLOCK
    while left:
        data = tar.read(min(left, 1 << 20))
        if not data:
            raise EOFError("it ends in the middle of a file")
        left -= len(data)
        if keep:
            out.write(data)


def _signed(header: bytes) -> bytes:
    """The header without GNU's extra times, its checksum made anew."""
    if header[257:265] == GNU_MAGIC:
        header = header[: TIMES.start] + bytes(TIMES.stop - TIMES.start) + header[TIMES.stop :]
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def number(field: bytes) -> int:
    """A number of a tar header: octal, or from GNU tar binary behind a set top bit."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)
