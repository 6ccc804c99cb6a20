"""Files in pieces, as frames carry them."""

from __future__ import annotations

import os
import stat
from binascii import b2a_base64

from apppot.guest import syscalls

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    # Type and payload on the stream FILES.
    Frame = tuple[int, bytes]


PIECE_BYTES = 60 << 10
_SMALL = 16 << 10
_NO_DATA = 6  # ENXIO: what follows is a hole


class Root:
    """The job's root at `path`, of which files are sent; `beat` is called in long work."""

    def __init__(self, path: str, beat: Callable[[], object]) -> None:
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.beat = beat
        self._number = 0

    def next_number(self) -> int:
        """The id of one more file on the stream FILES."""
        self._number += 1
        return self._number

    def open(self, place: bytes) -> int | None:
        """The regular file that `place` names in the guest now; None where there is none."""
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            fd = syscalls.open_in_root(self.fd, place, flags)
        except OSError:
            return None
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        return None


def new_digest() -> Any:
    # The C module: `hashlib` loads all of OpenSSL.
    from _blake2 import blake2b

    return blake2b()


def describe(number: int, kind: str, name: bytes, found: os.stat_result) -> dict[str, Any]:
    return {
        "id": number,
        "kind": kind,
        "path": encoded(name),
        "mode": stat.S_IMODE(found.st_mode),
        "mtime": found.st_mtime_ns,
        "size": found.st_size if kind == "file" else 0,
    }


def encoded(value: bytes) -> str:
    return b2a_base64(value, newline=False).decode("ascii")


def mode_and_time(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return stat.S_IMODE(found.st_mode), found.st_mtime_ns


def digest_of(fd: int, beat: Callable[[], object]) -> tuple[Any, int]:
    """Digest and size of all that the file holds."""
    digest, size = new_digest(), 0
    while data := os.pread(fd, 1 << 20, size):
        digest.update(data)
        size += len(data)
        beat()
    return digest, size


def in_pieces(fd: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of all of a file of `size` bytes that is no hole."""
    at = 0
    if 0 < size <= _SMALL:  # has no hole that would be worth two more calls
        yield at, _exactly(fd, size)
        return
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != _NO_DATA:
                raise
            return
        end = min(size, os.lseek(fd, at, os.SEEK_HOLE))
        while at < end:
            data = os.pread(fd, min(PIECE_BYTES, end - at), at)
            if not data:
                raise OSError("it became shorter while it was read")
            yield at, data
            at += len(data)


def _exactly(fd: int, size: int) -> bytes:
    data = os.pread(fd, size, 0)
    if len(data) < size:
        raise OSError("it became shorter while it was read")
    return data
