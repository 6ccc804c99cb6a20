"""Processes that join a running guest: the launcher's side of `apppot exec` and `apppot stop`.

A client connects to the launcher's control socket and passes its own stdin, stdout and stderr;
the launcher pumps them like the payload's.  Whatever a client does, the payload does not wait.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable
from typing import Any

from apppot.guest.protocol import frames
from apppot.guest.protocol.job import Job
from apppot.host.channel.control import MESSAGE_BYTES, Request
from apppot.host.channel.outcome import Outcome, checked_report, complaint, exit_code
from apppot.host.channel.streams import Sink, Source, exchange_file

_DESCRIPTORS = 4  # stdin, stdout, stderr, and the file with the request
_REQUEST_BYTES = 16 << 20
# How long what a process wrote may wait for its reader when the virtual machine has ended.
_LAST_SECONDS = 2.0


class Client:
    """One connection, and the process that was started for it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection: socket.socket | None = connection
        self.fds: list[int] = []
        self.number = 0  # of its process; 0: none yet
        self.name = ""  # of its description in the exchange directory
        self.started = False
        self.source: Source | None = None
        self.sinks: tuple[Sink, ...] = ()
        self.last: dict[str, Any] | None = None  # what is said when the output is passed on

    def say(self, message: dict[str, Any]) -> None:
        """Send it a message; one that is gone, or reads nothing, needs none."""
        if self.connection is not None:
            try:
                self.connection.send(json.dumps(message).encode()[:MESSAGE_BYTES])
            except OSError:
                pass

    def let_go(self) -> None:
        """Close everything that is the client's."""
        if self.source is not None:
            self.source.forget()
        for sink in self.sinks:
            sink.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        if self.connection is not None:
            self.connection.close()
            self.connection = None


class Joined:
    """All that joined one guest."""

    def __init__(
        self,
        job: Job,
        exchange: str | None,
        window: int,
        send: Callable[[bytes], None],
        stop: Callable[[float], None],
    ) -> None:
        self._job, self._exchange, self._send, self._stop = job, exchange, send, stop
        # The payload's input is not to wait for that of all others.
        self._window = window // frames.PROCESSES
        self._clients: list[Client] = []
        self._processes: dict[int, Client] = {}  # by number, until the guest has said EXIT
        self._give_up_at: float | None = None

    # -- the launcher's loop -------------------------------------------------------------------

    def accept(self, listener: socket.socket) -> None:
        """Take one client in; only the launcher's own user may be one."""
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if struct.unpack("3i", credentials)[1] not in (0, os.getuid()):
            connection.close()
            return
        connection.setblocking(False)
        self._clients.append(Client(connection))

    def register(self, poll: select.poll) -> None:
        """Add what is waited for."""
        for client in self._clients:
            if client.connection is not None:
                poll.register(client.connection, select.POLLIN)
        for client in self._processes.values():
            for sink in client.sinks:
                if (fd := sink.fd()) is not None:
                    poll.register(fd, select.POLLOUT)
            if (source := _readable(client)) is not None:
                poll.register(source, select.POLLIN)

    def handle(self, ready: dict[int, int]) -> None:
        """Act on what `poll` said."""
        for client in list(self._processes.values()):
            for sink in client.sinks:
                if sink.fd() in ready:
                    self._passed_on(sink, sink.flush())
            source = _readable(client)
            if source in ready and client.source is not None:
                for frame in client.source.read():
                    self._send(frame)
            self._finish(client)
        for client in list(self._clients):
            if client.connection is not None and client.connection.fileno() in ready:
                self._hear(client)

    def finished(self) -> bool:
        """Whether all that processes wrote is passed on; the guest has ended."""
        if self._give_up_at is None:
            self._give_up_at = time.monotonic() + _LAST_SECONDS
        flowing = [c for c in self._processes.values() if any(s.fd() is not None for s in c.sinks)]
        return not flowing or time.monotonic() >= self._give_up_at

    def close(self) -> None:
        """The guest is gone."""
        for client in self._clients:
            client.say(client.last or {"error": "the virtual machine has ended"})
            client.let_go()

    # -- clients -------------------------------------------------------------------------------

    def _hear(self, client: Client) -> None:
        assert client.connection is not None
        flags = socket.MSG_CMSG_CLOEXEC
        fds: list[int] = []
        try:
            data, fds, _, _ = socket.recv_fds(client.connection, MESSAGE_BYTES, _DESCRIPTORS, flags)
            if not data:
                self._gone(client)
                return
            self._message(client, json.loads(data), fds)
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            client.say({"error": f"bad request: {error}"})
            self._gone(client)
        finally:
            for fd in fds:
                os.close(fd)

    def _message(self, client: Client, message: Any, fds: list[int]) -> None:
        if "stop" in message:
            self._stop(max(0.0, float(message["stop"])))
        elif "signal" in message:
            self._signal(client, int(message["signal"]))
        elif "resize" in message:
            size = frames.SIZE.pack(*[int(number) for number in message["resize"]])
            self._control(client, frames.RESIZE, size)
        elif "exec" in message and not client.number:
            self._exec(client, fds)

    def _exec(self, client: Client, fds: list[int]) -> None:
        if len(fds) != _DESCRIPTORS:
            raise ValueError(f"{len(fds)} descriptors")
        free = [n for n in range(1, frames.PROCESSES) if n not in self._processes]
        if not free:
            client.say({"error": f"{frames.PROCESSES - 1} processes have joined already"})
            self._gone(client)
            return
        request = Request.load(_read(fds[3]))
        client.fds = [os.dup(fd) for fd in fds[:3]]
        client.number = free[0]
        control = client.number * frames.STREAMS
        client.source = Source(
            client.fds[0] if request.read_stdin else _nothing(client),
            self._exchange,
            request.tty,
            control + frames.STDIN,
            self._window,
        )
        client.sinks = (
            Sink(control + frames.STDOUT, client.fds[1]),
            Sink(control + frames.STDERR, client.fds[2]),
        )
        self._processes[client.number] = client
        self._describe(client, request.job(self._job).dump())

    def _describe(self, client: Client, description: bytes) -> None:
        if self._exchange is None:
            for at in range(0, len(description), frames.MAX_PAYLOAD):
                piece = description[at : at + frames.MAX_PAYLOAD]
                self._control(client, frames.EXEC_PART, piece)
            self._control(client, frames.EXEC, b"{}")
            return
        client.name, fd = exchange_file(self._exchange)
        with open(fd, "wb") as file:
            file.write(description)
        self._control(client, frames.EXEC, b'{"name": %d}' % int(client.name))

    def _gone(self, client: Client) -> None:
        """The client has gone: its process is hung up."""
        self._clients.remove(client)
        if self._processes.get(client.number) is client and client.last is None:
            self._signal(client, signal.SIGHUP)
            self._signal(client, signal.SIGCONT)
            control = client.number * frames.STREAMS
            for stream in (frames.STDIN, frames.STDOUT, frames.STDERR):
                self._send(frames.encode(frames.CLOSED, control + stream))
        client.let_go()

    def _signal(self, client: Client, number: int) -> None:
        self._control(client, frames.SIGNAL, frames.U32.pack(number))

    def _control(self, client: Client, kind: int, payload: bytes) -> None:
        if client.number:
            self._send(frames.encode(kind, client.number * frames.STREAMS, payload))

    # -- the guest -----------------------------------------------------------------------------

    def frame(self, kind: int, stream: int, payload: bytes) -> None:
        """A frame of a process that joined.  Raises FrameError for one that nobody started."""
        client = self._processes.get(stream // frames.STREAMS)
        if client is None or client.source is None:
            raise frames.FrameError(f"stream {stream} of a process that nobody started")
        if kind == frames.DATA:
            sink = self._sink(client, stream)
            self._passed_on(sink, sink.add(payload))
        elif kind == frames.CREDIT:
            client.source.credit(frames.U32.unpack(payload)[0])
        elif kind == frames.CHUNK_DONE and client.connection is not None:
            client.source.chunk_done(payload.decode("ascii"))
        elif kind == frames.CLOSED:
            client.source.stop()
        elif kind == frames.STARTED:
            client.started = True
            self._read_in(client)
            client.say({"started": True})
        elif kind == frames.STOPPED:
            client.say({"stopped": True})
        elif kind == frames.FAILED:
            self._ended(client, {"error": str(json.loads(payload)["reason"])[:1000]})
        elif kind == frames.EXIT:
            outcome = Outcome(report=checked_report(json.loads(payload)))
            self._ended(client, {"exit": exit_code(outcome), "complaint": complaint(outcome)})

    def _sink(self, client: Client, stream: int) -> Sink:
        for sink in client.sinks:
            if sink.stream == stream:
                return sink
        raise frames.FrameError(f"data on stream {stream}")

    def _passed_on(self, sink: Sink, count: int) -> None:
        if sink.closed:
            self._send(frames.encode(frames.CLOSED, sink.stream))
        elif credit := sink.credit(count):
            self._send(frames.encode(frames.CREDIT, sink.stream, frames.U32.pack(credit)))

    def _read_in(self, client: Client) -> None:
        """The guest has read the description, which may hold secrets."""
        if client.name and self._exchange is not None:
            os.unlink(os.path.join(self._exchange, client.name))
            client.name = ""

    def _ended(self, client: Client, last: dict[str, Any]) -> None:
        self._read_in(client)
        client.last = last
        if client.source is not None:
            client.source.forget()
        self._finish(client)

    def _finish(self, client: Client) -> None:
        """Say how the process ended once all that it wrote is passed on."""
        if client.last is None or any(sink.fd() is not None for sink in client.sinks):
            return
        self._processes.pop(client.number, None)
        client.say(client.last)
        client.let_go()
        if client in self._clients:
            self._clients.remove(client)


def _readable(client: Client) -> int | None:
    """The client's stdin, while its process takes more."""
    return client.source.fd() if client.started and client.source is not None else None


def _nothing(client: Client) -> int:
    client.fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    return client.fds[-1]


def _read(fd: int) -> bytes:
    """The contents of the request's file, which must be one: anything else could let us wait."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _REQUEST_BYTES:
        raise ValueError("the request is not a small file")
    return os.pread(fd, _REQUEST_BYTES, 0)
