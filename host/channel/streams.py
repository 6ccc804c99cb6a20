"""The launcher's ends of the payload's streams.

The caller's descriptors are shared with other processes, so they are never made non-blocking;
a pipe or terminal is opened anew for that.
"""

from __future__ import annotations

import itertools
import os
import select
import stat

from apppot.guest.protocol import frames
from apppot.host.common.files import write_all

# What goes through a file in the exchange directory instead of the serial line is more than this
# part of the window at once.
_WINDOW_PARTS = 3
_CHUNK_BYTES = 4 << 20
_CHUNKS_UNDER_WAY = 4
_CREDIT_BYTES = frames.OUTPUT_CREDIT // 8
# What a poll for writing promises at least of a pipe (PIPE_BUF).
_SAFE_WRITE = 4096
# Names of files in the exchange directory, which all streams of a launcher share.
_names = itertools.count()


class Sink:
    """Where one output stream goes: the launcher's own stdout or stderr."""

    def __init__(self, stream: int, fd: int) -> None:
        self.stream = stream
        self._given = fd
        self._fd, self._limit = _writable(fd)
        self._buffer = bytearray()
        self.closed = self._fd is None
        self.written = 0
        self._owed = 0

    def fd(self) -> int | None:
        """The descriptor to poll for writing, while there is something to write."""
        return self._fd if self._buffer and not self.closed else None

    def close(self) -> None:
        """Write nothing any more; the descriptor that was given stays open."""
        if self._fd is not None and self._fd != self._given:
            os.close(self._fd)
        self._fd = None
        self.closed = True
        self._buffer.clear()

    def add(self, data: bytes) -> int:
        """Take data and write what can be written; the bytes that are passed on by that."""
        if self.closed:
            return len(data)
        self._buffer += data
        return self.flush() if len(self._buffer) == len(data) else 0

    def credit(self, count: int) -> int:
        """The credit to give now, after `count` more bytes were passed on.

        In large pieces while there is a backlog: a guest's serial line buffers 4096 bytes, which
        a slow reader's many small ones would fill.
        """
        self._owed += count
        if self._buffer and self._owed < _CREDIT_BYTES:
            return 0
        credit, self._owed = self._owed, 0
        return credit

    def flush(self) -> int:
        """Write what the reader takes without waiting; the bytes written.

        A reader that is gone closes the sink (`closed`); what was buffered is dropped, as it is
        for a local process.
        """
        total = 0
        while self._buffer:
            try:
                count = os.write(self._fd or 0, self._buffer[: self._limit])
            except BlockingIOError:
                break
            except OSError:
                self.closed = True
                total += len(self._buffer)
                self._buffer.clear()
                break
            del self._buffer[:count]
            total += count
            if self._limit == _SAFE_WRITE:
                break  # the next write might wait: ask poll again
        self.written += total
        return total


def _writable(fd: int) -> tuple[int | None, int]:
    """A descriptor that writes to what `fd` does, and how much it takes at once without waiting."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return None, 0
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISBLK(mode):
        return fd, 1 << 20
    try:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        return os.open(f"/proc/self/fd/{fd}", flags), 1 << 18
    except OSError:
        return fd, _SAFE_WRITE


class Source:
    """The launcher's stdin, or that of a process that joined.

    Frames for a little, chunk files for a lot where there is an exchange directory.
    """

    def __init__(
        self,
        fd: int | None,
        exchange: str | None,
        tty: bool,
        stream: int = frames.STDIN,
        window: int = frames.INPUT_CREDIT,
    ) -> None:
        self._exchange = exchange
        self._tty = tty
        self._stream = stream
        self._credit = window
        self._frame_bytes = window // _WINDOW_PARTS
        self._fd = fd
        self._under_way: set[str] = set()
        self._regular = fd is not None and stat.S_ISREG(os.fstat(fd).st_mode)

    def fd(self) -> int | None:
        """The descriptor to poll for reading, while the guest takes more."""
        room = self._credit >= self._frame_bytes and len(self._under_way) < _CHUNKS_UNDER_WAY
        return self._fd if room else None

    def stop(self) -> None:
        """Nobody reads stdin any more."""
        self._fd = None

    def credit(self, count: int) -> None:
        """The payload took `count` bytes that went as frames."""
        self._credit += count

    def chunk_done(self, name: str) -> None:
        """The payload took the chunk file `name`."""
        self._under_way.remove(name)
        self._remove(name)

    def forget(self) -> None:
        """The process has ended: remove what it did not take."""
        self._fd = None
        while self._under_way:
            self._remove(self._under_way.pop())

    def _remove(self, name: str) -> None:
        assert self._exchange is not None
        os.unlink(os.path.join(self._exchange, name))

    def read(self) -> list[bytes]:
        """Read what there is; the frames that carry it."""
        assert self._fd is not None
        try:
            whole = self._tty or self._exchange is None
            data = os.read(self._fd, self._frame_bytes if whole else 1 << 16)
        except OSError:  # EIO: a terminal that is gone
            data = b""
        if not data:
            self._fd = None
            return [frames.encode(frames.END, self._stream)]
        if len(data) <= self._frame_bytes:
            self._credit -= len(data)
            return [frames.encode(frames.DATA, self._stream, data)]
        return [self._chunk(data)]

    def _chunk(self, data: bytes) -> bytes:
        assert self._exchange is not None
        name, fd = exchange_file(self._exchange)
        self._under_way.add(name)
        try:
            size = 0
            while data:
                write_all(fd, data)
                size += len(data)
                data = self._more() if size < _CHUNK_BYTES else b""
        finally:
            os.close(fd)
        control = self._stream - frames.STDIN
        return frames.encode(frames.INPUT_FILE, control, b'{"name": %d}' % int(name))

    def _more(self) -> bytes:
        """What else can be read without waiting; empty when nothing can (or at the end)."""
        assert self._fd is not None
        if not self._regular:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if not poll.poll(0):
                return b""
        return os.read(self._fd, 1 << 20)


def exchange_file(folder: str) -> tuple[str, int]:
    """Make a file that the guest may read: its name, and a descriptor to write to it."""
    name = str(next(_names))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    return name, os.open(os.path.join(folder, name), flags, 0o600)
