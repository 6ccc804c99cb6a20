"""The agent's side of the channel: handshake, streams, signals, heartbeats, end.

One loop, one poll.  Control frames never wait behind data: data is taken from the payload only
while the channel has little to send, and only as far as the launcher gave credit.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select
import termios
import time

from apppot.guest.payload import process
from apppot.guest.protocol import frames
from apppot.guest.protocol.jsonlite import dumps, loads

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any

EXCHANGE = "/run/apppot/exchange"

HEARTBEAT_SECONDS = 1.0
# How long what the payload left running has between SIGTERM and SIGKILL.
LEFTOVER_SECONDS = 1.0
_READ_BYTES = 60 << 10
_BACKLOG_BYTES = 128 << 10
_HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL


class ChannelLost(Exception):
    """The launcher is gone; nobody waits for this guest any more."""


def open_channel(device: str) -> int:
    """Open the channel's serial line or port and make it carry bytes as they are."""
    fd = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    if os.isatty(fd):
        attributes = termios.tcgetattr(fd)
        attributes[0] = attributes[1] = attributes[3] = 0
        attributes[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
        attributes[6][termios.VMIN] = 1
        attributes[6][termios.VTIME] = 0
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
    return fd


class Channel:
    """Frames over a non-blocking descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._out = bytearray()
        self._decoder = frames.Decoder(frames.HOST_TYPES)

    def send(self, kind: int, stream: int = frames.CONTROL, payload: bytes = b"") -> None:
        """Queue a frame and pass on what the channel takes at once."""
        self._out += frames.encode(kind, stream, payload)
        self.flush()

    def backlog(self) -> int:
        """Bytes that the channel has not taken yet."""
        return len(self._out)

    def flush(self) -> None:
        """Write what the channel takes without waiting."""
        while self._out:
            try:
                count = os.write(self.fd, self._out)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelLost(str(error)) from error
            if count == 0:
                return
            del self._out[:count]

    def receive(self) -> list[tuple[int, int, bytes]]:
        """The frames that have come in.  Raises ChannelLost at the end of the channel."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelLost(str(error)) from error
        if not data:
            raise ChannelLost("end of file")
        return self._decoder.feed(data)

    def drain(self) -> None:
        """Wait until all is written."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while self._out:
            poll.poll(1000)
            self.flush()


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

    def pump(self, channel: Channel) -> None:
        """Pass on what can be read now, as far as credit goes; END at its end."""
        if self.fd is None:
            return
        try:
            data = os.read(self.fd, min(_READ_BYTES, self.credit))
        except BlockingIOError:
            return
        except OSError:  # EIO: a terminal that nobody has open any more
            data = b""
        if not data:
            self.close()
            channel.send(frames.END, self.stream)
            return
        self.credit -= len(data)
        channel.send(frames.DATA, self.stream, data)


class Input:
    """The payload's stdin: frames for a little, chunk files for a lot, in their order."""

    def __init__(self, fd: int | None, tty: bool) -> None:
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
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

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
            channel.send(frames.CLOSED, frames.STDIN)
            return
        self._close_if_done()

    def _pump_bytes(self, channel: Channel, item: bytes) -> None:
        assert self.fd is not None
        count = os.write(self.fd, item)
        channel.send(frames.CREDIT, frames.STDIN, frames.U32.pack(count))
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
            channel.send(frames.CHUNK_DONE, frames.STDIN, name.encode())


class Session:
    """Runs one payload for a launcher, from HELLO to EXIT."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._go = False
        self._payload: process.Payload | None = None
        self._tty = False
        self._outputs: list[Output] = []
        self._input = Input(None, False)
        self._status: int | None = None
        self._usage: Any = None
        self._childless = False
        self._leftover_deadline: float | None = None
        self._leftovers_ended = False
        self._next_heartbeat = 0.0
        self._wake = self._wake_on_children()

    @staticmethod
    def _wake_on_children() -> int:
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        _signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        return read

    def wait_for_go(self) -> None:
        """Return when the launcher says GO; it alone decides that this guest runs the payload."""
        while not self._go:
            self._turn()
        self._go = False

    def run(self, payload: process.Payload, tty: bool) -> dict[str, Any]:
        """Carry the payload's streams to its end; returns what EXIT says, not yet sent."""
        self._payload, self._tty = payload, tty
        stdout = Output(frames.STDOUT, payload.stdout)
        stderr = Output(frames.STDERR, payload.stderr)
        self._outputs = [stdout, stderr]
        self._input = Input(payload.stdin, tty)
        if payload.error is None:
            self.channel.send(frames.STARTED, payload=b"{}")
        while not self._finished():
            self._turn()
        self._input.close()
        return self._report(payload)

    def _finished(self) -> bool:
        streams_open = any(output.fd is not None for output in self._outputs)
        return self._status is not None and self._childless and not streams_open

    def _report(self, payload: process.Payload) -> dict[str, Any]:
        usage = self._usage
        report = {
            "status": None if payload.error else self._status,
            "user": usage.ru_utime,
            "system": usage.ru_stime,
            "maxrss": usage.ru_maxrss,
            "leftovers_ended": self._leftovers_ended,
        }
        if payload.error:
            report["errno"], report["what"] = payload.error
        return report

    def _turn(self) -> None:
        """Wait for the next event and handle it."""
        poll = select.poll()
        want_out = select.POLLOUT if self.channel.backlog() else 0
        poll.register(self.channel.fd, select.POLLIN | want_out)
        poll.register(self._wake, select.POLLIN)
        room = self.channel.backlog() < _BACKLOG_BYTES
        for output in self._outputs:
            if output.fd is not None and output.credit and room:
                poll.register(output.fd, select.POLLIN)
        if self._input.pending():
            assert self._input.fd is not None
            poll.register(self._input.fd, select.POLLOUT)
        ready = dict(poll.poll(self._timeout()))
        self._handle(ready)

    def _timeout(self) -> int:
        """Milliseconds until the next thing that is due by time."""
        due = self._next_heartbeat
        if self._leftover_deadline is not None:
            due = min(due, self._leftover_deadline)
        return max(0, int((due - time.monotonic()) * 1000) + 1)

    def _handle(self, ready: dict[int, int]) -> None:
        if self._wake in ready:
            os.read(self._wake, 4096)
            self._reap()
        events = ready.get(self.channel.fd, 0)
        if events & select.POLLOUT:
            self.channel.flush()
        if events & (select.POLLIN | _HANGUP):
            for frame in self.channel.receive():
                self._frame(*frame)
        for output in self._outputs:
            if output.fd is not None and output.fd in ready and output.credit:
                output.pump(self.channel)
        if self._input.fd is not None and ready.get(self._input.fd, 0):
            self._input.pump(self.channel)
        self._due()

    def _due(self) -> None:
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_SECONDS
            if not self.channel.backlog():
                self.channel.send(frames.HEARTBEAT, payload=dumps(vital_signs()).encode())
        if self._leftover_deadline is not None and now >= self._leftover_deadline:
            self._leftover_deadline = now + HEARTBEAT_SECONDS
            _signal_all(_signal.SIGKILL)

    def _frame(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == frames.DATA:
            self._input.add(payload)
            self._input.pump(self.channel)
        elif kind == frames.INPUT_FILE:
            message: Any = loads(payload.decode())
            self._input.add(str(int(message["name"])))
        elif kind == frames.END:
            self._input.end()
        elif kind == frames.CREDIT:
            self._output(stream).credit += frames.U32.unpack(payload)[0]
        elif kind == frames.CLOSED:
            self._output(stream).close()
        elif kind == frames.SIGNAL:
            self._signal(frames.U32.unpack(payload)[0])
        elif kind == frames.RESIZE and self._input.fd is not None:
            process.resize(self._input.fd, *frames.SIZE.unpack(payload))
        elif kind == frames.GO:
            self._go = True

    def _output(self, stream: int) -> Output:
        return self._outputs[stream - frames.STDOUT]

    def _signal(self, number: int) -> None:
        if self._payload is None or self._status is not None:
            return
        try:
            os.killpg(self._payload.pid, number)
        except ProcessLookupError:
            pass

    def _reap(self) -> None:
        """Collect every process that has ended; PID 1 inherits all orphans."""
        # A child of a boot step may have been the last one, once.
        self._childless = False
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                self._childless = True
                return
            if pid == 0:
                break
            if self._payload is None or pid != self._payload.pid:
                continue
            if not os.WIFSTOPPED(status):
                self._status, self._usage = status, usage
            elif self._tty:
                self.channel.send(frames.STOPPED, payload=b"{}")
        if self._status is not None and self._leftover_deadline is None:
            self._leftovers_ended = True
            self._leftover_deadline = time.monotonic() + LEFTOVER_SECONDS
            _signal_all(_signal.SIGTERM)
            _signal_all(_signal.SIGCONT)


def _signal_all(number: int) -> None:
    """Signal every process but this one; there may be none left."""
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        pass


def vital_signs() -> dict[str, Any]:
    """Memory in KiB, load averages and CPU ticks, as a heartbeat carries them."""
    with open("/proc/meminfo", "rb") as text:
        memory = {line.split(b":")[0]: int(line.split()[1]) for line in text.readlines()[:5]}
    with open("/proc/loadavg", encoding="ascii") as loads_text:
        load = [float(word) for word in loads_text.read().split()[:3]]
    return {
        "total": memory[b"MemTotal"],
        "available": memory[b"MemAvailable"],
        "load": load,
        "cpu": list(os.times()[:4]),
    }
