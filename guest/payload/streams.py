"""Streams of the payload and of processes that join it, under credit."""

from __future__ import annotations

import os

from apppot.guest.payload import process
from apppot.guest.payload.channel import Channel
from apppot.guest.protocol import frames

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any


EXCHANGE = "/run/apppot/exchange"
_READ_BYTES = 60 << 10


class Output:
    """One of the payload's output streams, on its way to the launcher."""

    def __init__(self, stream: int, fd: int | None) -> None:
        self.stream = stream
        self.fd = fd
        self.credit = frames.OUTPUT_CREDIT

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def pump(self, channel: Channel, last: bool = False) -> None:
        """Pass on what can be read now, as far as credit goes; END at its end.

        `last` says that what is not there yet does not count any more.
        """
        if self.fd is None or not self.credit:
            return
        try:
            data = os.read(self.fd, min(_READ_BYTES, self.credit))
        except BlockingIOError:
            if not last:
                return
            data = b""
        except OSError:  # EIO: a terminal that nobody has open any more
            data = b""
        if not data:
            self.close()
            channel.send(frames.END, self.stream)
            return
        self.credit -= len(data)
        channel.send(frames.DATA, self.stream, data)


class Input:
    """A process's stdin: frames for a little, chunk files for a lot, in their order."""

    def __init__(self, stream: int, fd: int | None, tty: bool) -> None:
        self.stream = stream
        self.fd = fd
        self._tty = tty
        self._queue: list[bytes | str] = []
        self._file: int | None = None
        self._ended = False

    def pending(self) -> bool:
        return self.fd is not None and bool(self._queue)

    def add(self, item: bytes | str) -> None:
        """Queue bytes, or the name of a chunk file in the exchange directory."""
        self._queue.append(item)

    def end(self) -> None:
        """The launcher's stdin has ended; the payload's ends when the queue is empty."""
        if self._tty:
            self._queue.append(b"\x04")
            return
        self._ended = True
        self._close_if_done()

    def close(self) -> None:
        for fd in (self.fd, self._file):
            if fd is not None:
                os.close(fd)
        self.fd = self._file = None

    def _close_if_done(self) -> None:
        if self._ended and not self._queue:
            self.close()

    def pump(self, channel: Channel) -> None:
        """Pass on what the payload takes without waiting."""
        if self.fd is None or not self._queue:
            return
        try:
            item = self._queue[0]
            if isinstance(item, bytes):
                self._pump_bytes(channel, item)
            else:
                self._pump_file(channel, item)
        except BlockingIOError:
            return
        except OSError:  # EPIPE: the payload has closed its stdin
            self.close()
            self._queue.clear()
            channel.send(frames.CLOSED, self.stream)
            return
        self._close_if_done()

    def _pump_bytes(self, channel: Channel, item: bytes) -> None:
        assert self.fd is not None
        count = os.write(self.fd, item)
        channel.send(frames.CREDIT, self.stream, frames.U32.pack(count))
        if count == len(item):
            self._queue.pop(0)
        else:
            self._queue[0] = item[count:]

    def _pump_file(self, channel: Channel, name: str) -> None:
        assert self.fd is not None
        if self._file is None:
            self._file = os.open(f"{EXCHANGE}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        if os.sendfile(self.fd, self._file, None, 1 << 18) == 0:
            os.close(self._file)
            self._file = None
            self._queue.pop(0)
            channel.send(frames.CHUNK_DONE, self.stream, name.encode())


class Process:
    """A process with its streams: the payload (number 0), or one that joined it."""

    def __init__(self, number: int, payload: process.Payload, tty: bool) -> None:
        self.control = number * frames.STREAMS
        self.payload, self.tty = payload, tty
        stdout = Output(self.control + frames.STDOUT, payload.stdout)
        stderr = Output(self.control + frames.STDERR, payload.stderr)
        self.outputs = (stdout, stderr)
        self.input = Input(self.control + frames.STDIN, payload.stdin, tty)
        self.status: int | None = None  # wait status once it was collected
        self.usage: Any = None

    def flows(self) -> bool:
        """Whether output may still come."""
        return any(output.fd is not None for output in self.outputs)

    def close(self, stream: int | None = None) -> None:
        """Close one of its streams, or all."""
        for end in (self.input, *self.outputs):
            if stream in (None, end.stream):
                end.close()

    def credit(self, stream: int, count: int) -> None:
        """`count` bytes of an output stream were passed on."""
        for output in self.outputs:
            if output.stream == stream:
                output.credit += count

    def signal(self, number: int) -> None:
        """Signal its process group, unless it has ended."""
        if self.status is None:
            try:
                os.killpg(self.payload.pid, number)
            except ProcessLookupError:
                pass

    def report(self) -> dict[str, Any]:
        """What its EXIT says."""
        usage, error = self.usage, self.payload.error
        report = {
            "status": None if error else self.status,
            "user": usage.ru_utime,
            "system": usage.ru_stime,
            "maxrss": usage.ru_maxrss,
        }
        if error:
            report["errno"], report["what"] = error
        return report
