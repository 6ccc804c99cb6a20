"""The agent's side of the channel: handshake, streams, signals, heartbeats, end.

One loop, one poll.  Control frames never wait behind data: data is taken from the payload only
while the channel has little to send, and only as far as the launcher gave credit.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select
import time

from apppot.guest.payload import process
from apppot.guest.payload.channel import HANGUP, Channel
from apppot.guest.payload.streams import EXCHANGE, Process
from apppot.guest.payload.vitals import vital_signs
from apppot.guest.protocol import frames
from apppot.guest.protocol.jsonlite import dumps, loads

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from apppot.guest.payload.outputs import Files

    # Starts what a description says beside the process with a pid: it, and whether it has a
    # terminal.
    Join = Callable[[bytes, int], "tuple[process.Payload, bool]"]


HEARTBEAT_SECONDS = 1.0
# How long what the payload left running has between SIGTERM and SIGKILL.
LEFTOVER_SECONDS = 1.0
_BACKLOG_BYTES = 128 << 10


class Session:
    """Runs one payload for a launcher, from HELLO to EXIT."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._go: bytes | None = None
        self._payload: Process | None = None
        self._processes: dict[int, Process] = {}  # by number, the payload among them
        self._join: Join | None = None
        self._described: dict[int, bytes] = {}  # descriptions of processes to come
        self._early: list[tuple[int, bytes]] = []  # for the payload, from before it started
        self.files: Files | None = None  # what comes back, where anything does
        self._childless = False
        self._leftover_deadline: float | None = None
        self._leftovers_ended = False
        self._next_heartbeat = 0.0
        self._wake = process.wake_on_children()

    def wait_for_go(self) -> bytes:
        """Return what GO says; the launcher alone decides that this guest runs the payload."""
        while self._go is None:
            self._turn()
        said, self._go = self._go, None
        return said

    def wait_for_wake(self) -> tuple[bytes, bytes]:
        """What wakes a machine that was kept: the job's description, and what WAKE says.

        Silent meanwhile: this machine is kept here, and each that resumes begins here.
        """
        description = b""
        while True:
            for kind, _, payload in self.channel.wait():
                if kind == frames.WAKE_PART:
                    description += payload
                elif kind == frames.WAKE:
                    return description, payload

    def run(self, payload: process.Payload, tty: bool, join: Join) -> dict[str, Any]:
        """Carry the payload's streams to its end; returns what EXIT says, not yet sent.

        `join` starts what is to run beside it.
        """
        self._payload = self._processes[0] = Process(0, payload, tty)
        self._join = join
        if payload.error is None:
            self.channel.send(frames.STARTED, payload=b"{}")
        for kind, said in self._early:
            self._process_frame(self._payload, kind, 0, said)
        while not self._finished(self._payload):
            self._turn()
        for number in [number for number in self._processes if number]:
            self._part(number)
        self._payload.close()
        return {**self._payload.report(), "leftovers_ended": self._leftovers_ended}

    def beat(self) -> None:
        """Show the launcher that this guest lives; for who works long between two turns."""
        self.channel.flush()
        self._due()

    def return_files(self, files: Files) -> dict[str, Any]:
        """Send what the payload left; returns what EXIT says of that."""
        self.channel.send(frames.RETURNING, payload=b"{}")
        files.leave()
        while not files.done:
            self._turn()
        return files.report()

    def _finished(self, payload: Process) -> bool:
        return payload.status is not None and self._childless and not payload.flows()

    def _turn(self) -> None:
        """Wait for the next event and handle it."""
        poll = select.poll()
        want_out = select.POLLOUT if self.channel.backlog() else 0
        poll.register(self.channel.fd, select.POLLIN | want_out)
        poll.register(self._wake, select.POLLIN)
        room = self.channel.backlog() < _BACKLOG_BYTES
        for one in self._processes.values():
            for output in one.outputs:
                if output.fd is not None and output.credit and room:
                    poll.register(output.fd, select.POLLIN)
            if one.input.pending():
                assert one.input.fd is not None
                poll.register(one.input.fd, select.POLLOUT)
        files = self.files
        if files is not None and files.fd is not None:
            poll.register(files.fd, select.POLLIN)
        busy = files is not None and files.busy() and room
        ready = dict(poll.poll(0 if busy else self._timeout()))
        self._handle(ready)
        if files is not None:
            if files.fd in ready:
                files.notice()
            files.pump(self.channel)

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
        if events & (select.POLLIN | HANGUP):
            for frame in self.channel.receive():
                self._frame(*frame)
        for one in self._processes.values():
            for output in one.outputs:
                if output.fd in ready:
                    output.pump(self.channel)
            if one.input.fd in ready:
                one.input.pump(self.channel)
        self._part_ended()
        self._due()

    def _due(self) -> None:
        now = time.monotonic()
        if now >= self._next_heartbeat:
            self._next_heartbeat = now + HEARTBEAT_SECONDS
            if not self.channel.backlog():
                self.channel.send(frames.HEARTBEAT, payload=dumps(vital_signs()).encode())
        if self._leftover_deadline is not None and now >= self._leftover_deadline:
            self._leftover_deadline = now + HEARTBEAT_SECONDS
            process.signal_all(_signal.SIGKILL)

    def _frame(self, kind: int, stream: int, payload: bytes) -> None:
        number = stream // frames.STREAMS
        if kind == frames.GO:
            self._go = payload
        elif kind == frames.EXEC_PART:
            self._described[number] = self._described.get(number, b"") + payload
        elif kind == frames.EXEC:
            self._exec(number, payload)
        elif kind == frames.CREDIT and stream == frames.FILES and self.files is not None:
            self.files.credit += frames.U32.unpack(payload)[0]
        elif number == 0 and self._payload is None and kind in (frames.SIGNAL, frames.RESIZE):
            self._early.append((kind, payload))
        # What was on its way to a process that has ended has lost its purpose.
        elif number in self._processes:
            self._process_frame(self._processes[number], kind, stream, payload)

    def _process_frame(self, one: Process, kind: int, stream: int, payload: bytes) -> None:
        if kind == frames.DATA:
            one.input.add(payload)
            one.input.pump(self.channel)
        elif kind == frames.INPUT_FILE:
            message: Any = loads(payload.decode())
            one.input.add(str(int(message["name"])))
        elif kind == frames.END:
            one.input.end()
        elif kind == frames.CREDIT:
            one.credit(stream, frames.U32.unpack(payload)[0])
        elif kind == frames.CLOSED:
            one.close(stream)
        elif kind == frames.SIGNAL:
            one.signal(frames.U32.unpack(payload)[0])
        elif kind == frames.RESIZE and one.input.fd is not None:
            process.resize(one.input.fd, *frames.SIZE.unpack(payload))

    def _exec(self, number: int, payload: bytes) -> None:
        """Start one more process beside the payload; what prevents that is its own failure."""
        control = number * frames.STREAMS
        try:
            if self._payload is None or self._payload.status is not None or self._join is None:
                raise ValueError("the main process has ended")
            description = self._described.pop(number, None) or _exchanged(payload)
            started, tty = self._join(description, self._payload.payload.pid)
        except Exception as error:  # whatever was asked for: the payload goes on
            reason = {"step": "exec", "reason": f"{error}"[:1000]}
            self.channel.send(frames.FAILED, control, dumps(reason).encode())
            return
        self._processes[number] = Process(number, started, tty)
        if started.error is None:
            self.channel.send(frames.STARTED, control, b"{}")

    def _part_ended(self) -> None:
        """Let go of joined processes that have ended, when what they wrote is on its way.

        What they left running keeps running without a reader; it ends with the payload.
        """
        for number, one in list(self._processes.items()):
            if not number or one.status is None:
                continue
            for output in one.outputs:
                if self.channel.backlog() < _BACKLOG_BYTES:
                    output.pump(self.channel, last=True)
            if not one.flows():
                self._part(number)

    def _part(self, number: int) -> None:
        one = self._processes.pop(number)
        one.close()
        self.channel.send(frames.EXIT, one.control, dumps(one.report()).encode())

    def _changed(self, one: Process, status: int, usage: Any) -> None:
        if not os.WIFSTOPPED(status):
            one.status, one.usage = status, usage
        elif one.tty:
            self.channel.send(frames.STOPPED, one.control, b"{}")

    def _reap(self) -> None:
        """Collect what has ended; once the payload has, end what it left running."""
        changed, left = process.reap(os.WNOHANG | os.WUNTRACED)
        # A child of a boot step may have been the last one, once.
        self._childless = not left
        for pid, status, usage in changed:
            for one in self._processes.values():
                if pid == one.payload.pid:
                    self._changed(one, status, usage)
        if self._childless:
            return
        ended = self._payload is not None and self._payload.status is not None
        if ended and self._leftover_deadline is None:
            self._leftovers_ended = True
            self._leftover_deadline = time.monotonic() + LEFTOVER_SECONDS
            process.signal_all(_signal.SIGTERM)
            process.signal_all(_signal.SIGCONT)


def _exchanged(payload: bytes) -> bytes:
    """The contents of the file in the exchange directory that a frame names."""
    message: Any = loads(payload.decode())
    with open(f"{EXCHANGE}/{int(message['name'])}", "rb") as file:
        return file.read()
