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

from apppot.guest.protocol import frames
from apppot.guest.protocol.job import Job
from apppot.host.channel import control
from apppot.host.channel.control import (
    MESSAGE_BYTES,
    Answer,
    ExecRequest,
    Execute,
    Exited,
    Order,
    Refused,
    Resize,
    Started,
    Stop,
    Stopped,
)
from apppot.host.channel.outcome import Outcome, checked_report, complaint, exit_code
from apppot.host.channel.process import ProcessStreams
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
        self.streams: ProcessStreams | None = None
        self.last: Answer | None = None  # what is said when the output is passed on

    def say(self, message: Answer) -> None:
        """Send it a message; one that is gone, or reads nothing, needs none."""
        if self.connection is not None:
            try:
                self.connection.send(control.dump(message))
            except OSError:
                pass

    def let_go(self) -> None:
        """Close everything that is the client's."""
        if self.streams is not None:
            self.streams.close()
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
            if client.streams is not None:
                client.streams.register(poll)

    def handle(self, ready: dict[int, int]) -> None:
        """Act on what `poll` said."""
        for client in list(self._processes.values()):
            if client.streams is not None:
                client.streams.handle(ready)
            self._finish(client)
        for client in list(self._clients):
            if client.connection is not None and client.connection.fileno() in ready:
                self._hear(client)

    def finished(self) -> bool:
        """Whether all that processes wrote is passed on; the guest has ended."""
        if self._give_up_at is None:
            self._give_up_at = time.monotonic() + _LAST_SECONDS
        flowing = any(_flowing(client) for client in self._processes.values())
        return not flowing or time.monotonic() >= self._give_up_at

    def close(self) -> None:
        """The guest is gone."""
        for client in self._clients:
            client.say(client.last or Refused("the virtual machine has ended"))
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
            self._order(client, control.load_order(data), fds)
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            client.say(Refused(f"bad request: {error}"))
            self._gone(client)
        finally:
            for fd in fds:
                os.close(fd)

    def _order(self, client: Client, order: Order, fds: list[int]) -> None:
        match order:
            case Stop(grace):
                self._stop(grace)
            case control.Signal(number):
                self._signal(client, number)
            case Resize(rows, columns):
                self._control(client, frames.RESIZE, frames.SIZE.pack(rows, columns))
            case Execute():
                if not client.number:
                    self._exec(client, fds)

    def _exec(self, client: Client, fds: list[int]) -> None:
        if len(fds) != _DESCRIPTORS:
            raise ValueError(f"{len(fds)} descriptors")
        free = [n for n in range(1, frames.PROCESSES) if n not in self._processes]
        if not free:
            client.say(Refused(f"{frames.PROCESSES - 1} processes have joined already"))
            self._gone(client)
            return
        request = ExecRequest.load(_read(fds[3]))
        client.fds = [os.dup(fd) for fd in fds[:3]]
        client.number = free[0]
        first = client.number * frames.STREAMS
        source = Source(
            client.fds[0] if request.read_stdin else _nothing(client),
            self._exchange,
            request.tty,
            first + frames.STDIN,
            self._window,
        )
        sinks = (
            Sink(first + frames.STDOUT, client.fds[1]),
            Sink(first + frames.STDERR, client.fds[2]),
        )
        client.streams = ProcessStreams(source, sinks, self._send)
        self._describe(client, request.job(self._job).dump())
        # Only now: of one that was never described no EXIT comes, which would free its number.
        self._processes[client.number] = client

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
            first = client.number * frames.STREAMS
            for stream in (frames.STDIN, frames.STDOUT, frames.STDERR):
                self._send(frames.encode(frames.CLOSED, first + stream))
        else:
            self._remove_description(client)
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
        if client is None or client.streams is None:
            raise frames.FrameError(f"stream {stream} of a process that nobody started")
        if client.streams.frame(kind, stream, payload):
            return
        match kind:
            case frames.STARTED:
                client.streams.started = True
                self._remove_description(client)
                client.say(Started())
            case frames.STOPPED:
                client.say(Stopped())
            case frames.FAILED:
                self._ended(client, Refused(str(json.loads(payload)["reason"])))
            case frames.EXIT:
                outcome = Outcome(report=checked_report(json.loads(payload)))
                self._ended(client, Exited(exit_code(outcome), complaint(outcome)))

    def _remove_description(self, client: Client) -> None:
        """The guest has read it, or never will; it may hold secrets."""
        if client.name and self._exchange is not None:
            os.unlink(os.path.join(self._exchange, client.name))
            client.name = ""

    def _ended(self, client: Client, last: Answer) -> None:
        self._remove_description(client)
        client.last = last
        if client.streams is not None:
            client.streams.ended()
        self._finish(client)

    def _finish(self, client: Client) -> None:
        """Say how the process ended once all that it wrote is passed on."""
        if client.last is None or _flowing(client):
            return
        self._processes.pop(client.number, None)
        client.say(client.last)
        client.let_go()
        if client in self._clients:
            self._clients.remove(client)


def _flowing(client: Client) -> bool:
    return client.streams is not None and client.streams.flowing()


def _nothing(client: Client) -> int:
    client.fds.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    return client.fds[-1]


def _read(fd: int) -> bytes:
    """The contents of the request's file, which must be one: anything else could let us wait."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _REQUEST_BYTES:
        raise ValueError("the request is not a small file")
    return os.pread(fd, _REQUEST_BYTES, 0)
