"""What a machine that does nothing costs the host's memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping

from benchmarks.boot import timeline
from benchmarks.guest import descendants
from benchmarks.machines import IMAGE, Bench, apppot_run
from benchmarks.measure import BenchmarkError, Row, interleaved, row

IDLE = 60.0  # MB, from the design
MORE_GB = 4.0
SETTLED = 1.5  # seconds from the launch


def measure(given: Bench) -> list[Row]:
    """Rows about idle machines with the default memory and with MORE_GB more."""
    more = ("--mem", f"{512 + int(MORE_GB * 1024)}M")
    subjects = {
        "default": lambda: idle(given),
        "more": lambda: idle(given, *more),
        "start": lambda: timeline(given.folder),
        "start with more": lambda: timeline(given.folder, *more),
    }
    found = interleaved(subjects, given.rounds(2, 7))
    small, large = found["default"]["machine"], found["more"]["machine"]
    key = "hypervisor to payload"
    fast, slow = found["start"][key], found["start with more"][key]
    return [
        row("memory", "idle machine, 512 MB", small, "MB", budget=IDLE),
        row("memory", "launcher and helpers beside it", found["default"]["beside"], "MB"),
        row("memory", "each further GB of guest memory", per_gb(large, small), "MB"),
        row("memory", "its start-up time", [1000 * s for s in per_gb(slow, fast)], "ms"),
    ]


def per_gb(large: list[float], small: list[float]) -> list[float]:
    """The difference for each GB more."""
    return [(more - less) / MORE_GB for more, less in zip(large, small, strict=True)]


def idle(given: Bench, *options: str) -> Mapping[str, float]:
    """MB of a machine whose payload sleeps: its processes with the memory file, and the rest.

    Shared pages count by the part of each sharer (PSS); the memory file by its blocks, since
    pages of it that no process maps just now are memory too.
    """
    argv = apppot_run(IMAGE, "sleep", "60", options=options)
    with subprocess.Popen(argv, cwd=given.folder, stdin=subprocess.DEVNULL) as process:
        try:
            time.sleep(SETTLED)
            return _memory_of(process.pid)
        finally:
            process.terminate()


def _memory_of(launcher: int) -> Mapping[str, float]:
    machine, beside, file = 0, _pss(launcher, "Pss"), 0
    for pid in descendants(launcher):
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as text:
            name = text.read().strip()
        if name in ("kernel", "uml-userspace"):
            machine += _pss(pid, "Pss_Anon") + _pss(pid, "Pss_File")
            file = max(file, _memory_file(pid))
        else:
            beside += _pss(pid, "Pss")
    if not file:
        raise BenchmarkError("the machine's memory file was not found")
    return {"machine": (machine + file) / 1e6, "beside": beside / 1e6}


def _pss(pid: int, field: str) -> int:
    """Bytes of one line of smaps_rollup; 0 where the process is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as lines:
            for line in lines:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _memory_file(pid: int) -> int:
    """Bytes that the deleted files which the process holds open take."""
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        place = f"/proc/{pid}/fd/{fd}"
        try:
            if os.readlink(place).endswith("(deleted)"):
                found = max(found, os.stat(place).st_blocks * 512)
        except OSError:
            continue
    return found
