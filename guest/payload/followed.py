"""Files that come back while they grow."""

from __future__ import annotations

import os

from apppot.guest.payload.pieces import PIECE_BYTES, describe, digest_of, mode_and_time, new_digest
from apppot.guest.protocol import frames
from apppot.guest.protocol.job import JOB_DIR
from apppot.guest.protocol.jsonlite import dumps

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

    from apppot.guest.payload.pieces import Frame, Root


class Followed:
    """A file that comes back while it grows.

    The host's file holds what the guest's file of that name holds: after it was replaced or cut
    it begins anew.  `name` is its path on the host, `place` in the guest.
    """

    def __init__(self, root: Root, path: bytes) -> None:
        inside = not path.startswith(b"/")
        self.name = path if inside else os.path.basename(path)
        self.place = os.path.join(JOB_DIR.encode(), path).lstrip(b"/")
        self.began = False
        self._root = root
        self._fd: int | None = None
        self._number: int | None = None  # while it is open on the host
        self._size = 0  # of what the host has
        self._digest = new_digest()
        self._before: tuple[int, int] | None = None
        if inside:
            self._adopt()

    def _adopt(self) -> None:
        """The host has what is there now: it is the copy of it."""
        self._fd = self._root.open(self.place)
        if self._fd is None:
            return
        self._digest, self._size = digest_of(self._fd, self._root.beat)
        self._before = mode_and_time(self._fd)
        self.began = True

    def updates(self) -> Iterator[Frame]:
        """What is new in it."""
        now = self._root.open(self.place)
        if now is not None and self._is_another(now):
            yield from self._anew(now)
        elif now is not None:
            os.close(now)
        if self._fd is None:
            return
        while data := os.pread(self._fd, PIECE_BYTES, self._size):
            if self._number is None:
                yield self._begin()
            yield frames.FILE_DATA, frames.PIECE.pack(self._number or 0, self._size) + data
            self._digest.update(data)
            self._size += len(data)

    def _is_another(self, now: int) -> bool:
        if self._fd is None:
            return True
        ours, theirs = os.fstat(self._fd), os.fstat(now)
        same = (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
        return not same or theirs.st_size < self._size

    def _anew(self, now: int) -> Iterator[Frame]:
        if self._number is not None:
            yield self._end()
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._size, self._digest = now, 0, new_digest()
        self.began, self._before = True, None
        yield self._begin()

    def rest(self) -> Iterator[Frame]:
        """The rest, when nobody writes any more: then the host's file is the guest's.

        However it was written: one that was changed in its middle is sent again.
        """
        yield from self.updates()
        if self._fd is None:
            return
        digest, size = digest_of(self._fd, self._root.beat)
        if (size, digest.digest()) != (self._size, self._digest.digest()):
            yield from self._anew(os.dup(self._fd))
            yield from self.updates()
        if self._number is None and self._before != mode_and_time(self._fd):
            yield self._begin()
        if self._number is not None:
            yield self._end()
        os.close(self._fd)
        self._fd = None

    def _begin(self) -> Frame:
        assert self._fd is not None
        self._number = self._root.next_number()
        head = describe(self._number, "follow", self.name, os.fstat(self._fd))
        head["size"] = self._size
        return frames.FILE, dumps(head).encode()

    def _end(self) -> Frame:
        assert self._fd is not None
        mode, mtime = mode_and_time(self._fd)
        end = {"id": self._number, "mode": mode, "mtime": mtime}
        self._number = None
        return frames.FILE_END, dumps(end).encode()
