"""Timing: launches in interleaved rounds, medians, and rows with a budget.

The one place of the benchmarks that starts processes to time them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from apppot.host.common.errors import ApppotError

TIMEOUT = 300.0


class BenchmarkError(ApppotError):
    """A measured program failed: its time means nothing."""


@dataclass(frozen=True)
class Done:
    """One timed launch: wall seconds from just before its start to its end, and its output."""

    seconds: float
    output: bytes


def launch(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path | None = None,
    cpus: frozenset[int] = frozenset(),
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    may_fail: bool = False,
) -> Done:
    """Run `argv` to its end and time it; `cpus`: what it may run on (empty: all of ours).

    Raises BenchmarkError where it fails, unless `may_fail`, or takes more than TIMEOUT seconds.
    """
    ours = os.sched_getaffinity(0)
    # Inherited, since code between fork and exec would count as the program's time.
    os.sched_setaffinity(0, cpus or ours)
    try:
        begun = time.monotonic()
        done = subprocess.run(
            argv, cwd=cwd, env=env, stdin=stdin, capture_output=True, timeout=TIMEOUT
        )
        seconds = time.monotonic() - begun
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{argv[0]} did not end in {TIMEOUT:.0f} s") from error
    finally:
        os.sched_setaffinity(0, ours)
    if done.returncode and not may_fail:
        tail = done.stderr.decode(errors="replace")[-400:]
        words = " ".join(os.fspath(word) for word in argv[:6])
        raise BenchmarkError(f"{words} … returned {done.returncode}: {tail}")
    return Done(seconds, done.stdout)


def until_line(argv: Sequence[str], line: str, cwd: Path) -> float:
    """Seconds from just before the start of `argv` to the first `line` among what it writes.

    Raises BenchmarkError where that does not come, or the program does not end well after it.
    """
    seconds, seen = 0.0, []
    begun = time.monotonic()
    with subprocess.Popen(
        argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        timer = threading.Timer(TIMEOUT, process.kill)
        timer.start()
        assert process.stdout is not None
        for text in process.stdout:
            if not seconds and text.strip() == line.encode():
                seconds = time.monotonic() - begun
            seen.append(text.decode(errors="replace"))
        timer.cancel()
    if process.returncode or not seconds:
        words = " ".join(argv[:6])
        tail = "".join(seen)[-400:]
        raise BenchmarkError(f"{words} … returned {process.returncode} without {line!r}: {tail}")
    return seconds


def interleaved(
    subjects: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Run all subjects once to warm up, then in `rounds` rounds, each in turn.

    A subject returns value by name; the answer is subject -> name -> values in order.  Subjects
    of one call can be compared: what else the machine did, it did to all of them.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in subjects}
    for number in range(rounds + 1):
        for name, subject in subjects.items():
            values = subject()
            if number == 0:
                continue
            for key, value in values.items():
                found[name].setdefault(key, []).append(value)
    return found


@dataclass(frozen=True)
class Row:
    """One measured figure.  `budget`: the design's limit; `against`: what `ratio` is to."""

    group: str
    case: str
    value: float
    unit: str
    low: float
    high: float
    rounds: int
    budget: float | None = None
    against: str = ""
    ratio: float | None = None

    @property
    def verdict(self) -> str:
        """ "ok" or "over" against the budget, "" where there is none."""
        if self.budget is None:
            return ""
        return "ok" if self.value <= self.budget else "over"


def row(
    group: str,
    case: str,
    values: Sequence[float],
    unit: str,
    *,
    budget: float | None = None,
    base: Sequence[float] | None = None,
    against: str = "",
) -> Row:
    """The median of `values`, with its ratio to the median of `base`."""
    middle = statistics.median(values)
    ratio = middle / statistics.median(base) if base else None
    return Row(
        group, case, middle, unit, min(values), max(values), len(values), budget, against, ratio
    )
