"""What came back of a run, and what the launcher makes of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from apppot.host.common.errors import (
    EXIT_NOT_EXECUTABLE,
    EXIT_NOT_FOUND,
    EXIT_SIGNAL_BASE,
    EXIT_TIME_LIMIT,
    HypervisorError,
)


class GuestFailed(Exception):
    """The guest did not do its part; `reason` says what was seen.

    `silent`: it never said a word, so that perhaps its hypervisor is to blame.
    """

    def __init__(self, reason: str, silent: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.silent = reason, silent


@dataclass
class Outcome:
    """What came back: the EXIT frame, and what was seen on the way."""

    report: dict[str, Any] = field(default_factory=dict)
    hello: dict[str, Any] = field(default_factory=dict)
    marks: list[tuple[str, float]] = field(default_factory=list)  # (what, monotonic seconds)
    timed_out: bool = False
    vital_signs: dict[str, Any] = field(default_factory=dict)


def checked_report(report: Any) -> dict[str, Any]:
    """An EXIT frame's report, of the form that the launcher relies on.  Raises ValueError.

    A guest is not trusted: what it says must not surprise the launcher later.
    """
    numbers = ("status", "errno")
    if not isinstance(report, dict) or all(report.get(name) is None for name in numbers):
        raise ValueError("an EXIT without a status")
    for name in numbers:
        value = report.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < 1 << 16):
            raise ValueError(f"an EXIT with {name} {value!r:.40}")
    return report


_ENOENT = 2


def exit_code(outcome: Outcome) -> int:
    """The launcher's exit status for what came back."""
    if outcome.timed_out:
        return EXIT_TIME_LIMIT
    report = outcome.report
    if report.get("status") is None:
        if report.get("errno") is None:
            raise HypervisorError("the guest reported no status", "this is a bug of AppPot")
        return EXIT_NOT_FOUND if report["errno"] == _ENOENT else EXIT_NOT_EXECUTABLE
    status = int(report["status"])
    if os.WIFSIGNALED(status):
        return EXIT_SIGNAL_BASE + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


def complaint(outcome: Outcome) -> str:
    """What to tell the user of a payload that could not be executed; empty otherwise."""
    report = outcome.report
    if outcome.timed_out:
        return "the time limit ended the payload"
    if report.get("errno") is not None:
        return f"{report['what']}: {os.strerror(int(report['errno']))}"
    return ""
