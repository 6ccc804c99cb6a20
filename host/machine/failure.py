"""What is said and kept when a guest fails."""

from __future__ import annotations

import contextlib
import json
import os
import time

from apppot.host.channel.outcome import GuestFailed
from apppot.host.common.errors import HypervisorError
from apppot.host.common.paths import state_home
from apppot.host.machine.diagnosis import diagnose, last_lines
from apppot.host.machine.run import Run


class NoHello(HypervisorError):
    """The guest never came to life: no payload has started, another hypervisor may be tried."""

    def __init__(self, cause: str, hint: str, reason: str) -> None:
        super().__init__(cause, hint)
        self.reason = reason


def explained(record: Run, failure: GuestFailed) -> HypervisorError:
    """The error for a guest that failed, with its console kept in a file."""
    console = record.console.text() if record.console is not None else ""
    meaning, remedy = diagnose(console)
    lines = [failure.reason + (f" ({meaning})" if meaning else "")]
    lines += [f"    | {line}" for line in last_lines(console)]
    kept = keep_failure(record, failure.reason, console)
    lines.append(f"  console and plan are kept in {kept}")
    if failure.silent:
        return NoHello("\n".join(lines), remedy, failure.reason)
    return HypervisorError("\n".join(lines), remedy)


_KEPT_FAILURES = 20


def keep_failure(record: Run, reason: str, console: str) -> str:
    """Write console and plan where the user finds them after the run; the directory."""
    last = OSError("no place")
    # Not the process's number: those of two PID namespaces may be the same.
    name = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(4).hex()}"
    for home in (state_home(), f"/tmp/apppot-failures-{os.getuid()}"):
        place = os.path.join(home, "failures", name)
        try:
            os.makedirs(place, mode=0o700)
            _write(os.path.join(place, "console.log"), console)
            _write(os.path.join(place, "plan.json"), json.dumps(describe(record, reason), indent=1))
            _prune(os.path.dirname(place))
            return place
        except OSError as error:
            last = error
    return f"nowhere ({last.strerror})"


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def _prune(folder: str) -> None:
    for name in sorted(os.listdir(folder))[:-_KEPT_FAILURES]:
        for part in ("console.log", "plan.json"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name, part))
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(folder, name))


def describe(record: Run, reason: str = "") -> dict[str, object]:
    """The run as JSON values, without the job's environment, which may hold secrets."""
    job = record.plan.job
    return {
        "version": 1,
        "reason": reason,
        "hypervisor": record.plan.hypervisor.name,
        "kernel": record.plan.kernel.release,
        "memory": record.plan.memory,
        "cpus": record.plan.cpus,
        "confinement": record.plan.confinement.kind,
        "command": [os.fsdecode(word) for word in job.argv],
        "argv": list(record.argv),
        "shown": {item.name: item.source for item in record.plan.shown},
        "marks": record.marks,
    }
