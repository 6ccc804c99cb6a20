"""What starting a machine that is kept, or resumes, adds to the start of any.

Its memory is a file without a name that the launcher fills and reads (memfd): the machine itself
never has a descriptor of what is kept, and each that resumes has a copy of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
from binascii import b2a_base64
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from apppot.guest.protocol import frames
from apppot.guest.protocol.job import Job
from apppot.guest.protocol.jsonlite import dumps
from apppot.host.channel.outcome import GuestFailed
from apppot.host.common.errors import HypervisorError
from apppot.host.confinement.sandbox import Shown
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.hypervisor.qmp import Monitor, OrderError
from apppot.host.warm import memory, store

_ENTROPY_BYTES = 64
_SECONDS = 60.0
# Memory that is a shared file stays out of the state that QEMU writes and reads.
_CAPABILITIES = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]


class _Start:
    """What both have for `apppot.host.machine.launch`: see its `WarmStart`."""

    memory: int
    devices: int | None = None
    first = b""
    hello: Callable[[], None] | None = None

    def attach(self, connection: socket.socket) -> Monitor:
        """The monitor of the hypervisor that has just been started.  Raises GuestFailed."""
        raise NotImplementedError


class Keeping(_Start):
    """A machine that boots to be kept.  `kept` is what came of it."""

    kept: store.Kept

    def __init__(
        self, plan: LaunchPlan, key: str, facts: Mapping[str, object], stack: contextlib.ExitStack
    ) -> None:
        self._key, self._facts = key, facts
        self.memory = _memory_file(plan.memory, stack)
        self._monitor: Monitor | None = None
        self.hello = self._keep

    def attach(self, connection: socket.socket) -> Monitor:
        self._monitor = Monitor(connection)
        with _failing():
            self._monitor.connect()
        return self._monitor

    def _keep(self) -> None:
        """The guest has said HELLO and stands still: keep what it is."""
        monitor = self._monitor
        assert monitor is not None
        with _failing():
            devices = _state_of(monitor)
        try:
            self.kept = store.keep(self._key, self._facts, self.memory, devices)
        except OSError as error:
            raise HypervisorError(
                f"the machine cannot be kept in {store.home()}: {error.strerror}",
                "make room there, or set XDG_CACHE_HOME to a directory on a disk that has some",
            ) from error


class Resuming(_Start):
    """A machine that goes on where a kept one stopped.  Raises OSError where that is gone.

    `plan` is what to start, instead of the one given.
    """

    def __init__(self, kept: store.Kept, plan: LaunchPlan, stack: contextlib.ExitStack) -> None:
        self.plan = resumed(plan, kept)
        self._extents = kept.extents
        self._file = os.open(kept.memory_file, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, self._file)
        with open(kept.device_file, "rb") as state:
            self._state = state.read()
        self.memory = _memory_file(kept.memory, stack)
        self._sender, receiver = socket.socketpair()
        stack.callback(self._sender.close)
        stack.callback(receiver.close)
        self.devices = receiver.fileno()
        self.first = _wake(plan.job)
        kept.touch()

    def attach(self, connection: socket.socket) -> Monitor:
        monitor = Monitor(connection)
        with _failing():
            # While QEMU starts.
            memory.unpack(self._file, self._extents, self.memory)
            monitor.connect()
            monitor.order("migrate-set-capabilities", capabilities=_CAPABILITIES)
            monitor.order("migrate-incoming", uri=f"fd:{self.devices}")
            self._sender.settimeout(_SECONDS)
            self._sender.sendall(self._state)
            self._sender.shutdown(socket.SHUT_WR)
        return monitor


def resumed(plan: LaunchPlan, kept: store.Kept) -> LaunchPlan:
    """`plan` for the machine that goes on where `kept` stopped: its kernel is in its memory."""
    stub = Shown("kernel", kept.stub)
    shown = tuple(stub if item.name == stub.name else item for item in plan.shown)
    return replace(plan, shown=shown)


def _state_of(monitor: Monitor) -> bytes:
    """The state of the machine's devices; it stands still from then on."""
    receiver, sender = socket.socketpair()
    with receiver:
        receiver.settimeout(_SECONDS)
        monitor.order("migrate-set-capabilities", capabilities=_CAPABILITIES)
        with sender:
            monitor.order("getfd", fd=sender.fileno(), fdname="devices")
        monitor.order("migrate", uri="fd:devices")
        with receiver.makefile("rb") as file:
            state = file.read()
    if monitor.await_event("MIGRATION", ("completed", "failed")) == "failed":
        raise OrderError("QEMU could not write the state of its devices")
    return state


def _memory_file(size: int, stack: contextlib.ExitStack) -> int:
    fd = os.memfd_create("apppot-memory")
    stack.callback(os.close, fd)
    os.truncate(fd, size)
    return fd


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """No payload has started: another start may do better."""
    try:
        yield
    except (OrderError, OSError, ValueError) as error:
        raise GuestFailed(
            f"the machine could not be kept or resumed: {error}", silent=True
        ) from error


def _wake(job: Job) -> bytes:
    """The frames that wake the machine: its job, and what no other machine has."""
    description = job.dump()
    pieces = [
        frames.encode(frames.WAKE_PART, payload=description[at : at + frames.MAX_PAYLOAD])
        for at in range(0, len(description), frames.MAX_PAYLOAD)
    ]
    entropy = b2a_base64(os.urandom(_ENTROPY_BYTES), newline=False).decode("ascii")
    said = dumps({"entropy": entropy}).encode()
    return b"".join([*pieces, frames.encode(frames.WAKE, payload=said)])
