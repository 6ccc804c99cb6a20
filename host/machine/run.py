"""One run under way: its plan, what it left, and when."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from apppot.host.channel.console import Console
from apppot.host.channel.outcome import Outcome
from apppot.host.confinement.sandbox import Confinement
from apppot.host.hypervisor.base import Hypervisor
from apppot.host.hypervisor.launchplan import LaunchPlan

if TYPE_CHECKING:
    from apppot.host.hypervisor.qmp import Monitor


@dataclass
class Run:
    """One run: its plan, what it left, and the times of its steps (monotonic seconds)."""

    plan: LaunchPlan
    hypervisor: Hypervisor
    marks: list[tuple[str, float]] = field(default_factory=list)
    argv: tuple[str, ...] = ()
    confinement: Confinement = Confinement.NONE
    console: Console | None = None
    monitor: Monitor | None = None
    outcome: Outcome | None = None

    def mark(self, what: str) -> None:
        self.marks.append((what, time.monotonic()))
