"""`apppot stop`: the end of runs, asked for from outside."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apppot.host.runs.records import RunRecord

_GRACE = "10s"
# What a launcher needs after the payload's SIGKILL, before it is killed itself.
_LAUNCHER_SECONDS = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `stop`."""
    parser.add_argument(
        "--time", metavar="DURATION", default=_GRACE,
        help=f"between SIGTERM and SIGKILL (default {_GRACE})",
    )  # fmt: skip
    parser.add_argument("names", metavar="NAME", nargs="+", help="name or id of a run")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Stop all of them at once, and wait until they have ended."""
    from apppot.host.common.units import parse_duration
    from apppot.host.runs import records as runs

    grace = 0.0 if args.time in ("0", "0s") else parse_duration(args.time)
    records = [runs.find(name) for name in args.names]
    with contextlib.ExitStack() as stack:
        for record in records:
            _ask(record, grace, stack)
        for record in records:
            if not runs.await_end(record, grace + _LAUNCHER_SECONDS):
                _signal(record, signal.SIGKILL)
                runs.await_end(record)
    return 0


def _ask(record: RunRecord, grace: float, stack: contextlib.ExitStack) -> None:
    """SIGTERM for the payload, SIGKILL after `grace` seconds; one that has ended needs none."""
    from apppot.host.channel import control
    from apppot.host.runs import records as runs

    match runs.state(record):
        case runs.RunState.STARTING:
            _signal(record, signal.SIGTERM)
        case runs.RunState.RUNNING:
            with contextlib.suppress(runs.RunError, OSError):
                connection = stack.enter_context(runs.connect(record))
                connection.setblocking(False)
                connection.send(control.dump(control.Stop(grace)))
        case runs.RunState.ELSEWHERE:
            runs.connect(record)


def _signal(record: RunRecord, number: int) -> None:
    from apppot.host.runs import records as runs

    pidfd = runs.launcher(record)
    if pidfd is not None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, number)
        os.close(pidfd)
