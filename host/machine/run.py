"""One run under way: its plan, what it left, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from apppot.host.channel.console import Console
from apppot.host.channel.outcome import Outcome
from apppot.host.hypervisor.launchplan import LaunchPlan

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from apppot.guest.protocol.job import Job
    from apppot.host.hypervisor.qmp import Monitor


@dataclass
class Run:
    """One run: its plan, what it left, and the times of its steps (monotonic seconds)."""

    plan: LaunchPlan
    job: Job | None = None  # as its guest got it
    marks: list[tuple[str, float]] = field(default_factory=list)
    argv: tuple[str, ...] = ()
    console: Console | None = None
    monitor: Monitor | None = None
    outcome: Outcome | None = None

    def mark(self, what: str) -> None:
        self.marks.append((what, time.monotonic()))


class RecordKeeper(Protocol):
    """Who keeps a run's record, by which others find it."""

    def open(self, run_directory: str) -> AbstractContextManager[socket.socket]:
        """The control socket of a run that has this directory, while it is there."""
        ...

    def started(self) -> object:
        """The payload's first instruction is next."""
        ...


class WarmStart(Protocol):
    """What differs in the start of a machine that is to be kept, or that goes on where one stopped.

    `memory` and `devices` are descriptors that the hypervisor inherits; a machine with `devices`
    waits until `attach` gives it its state.  `first` is the first that it is told, and `hello`
    is called instead of GO where there is one.
    """

    memory: int
    devices: int | None
    first: bytes
    hello: Callable[[], None] | None

    def attach(self, connection: socket.socket) -> Monitor:
        """The monitor of the hypervisor that has just been started.  Raises GuestFailed."""
        ...
