"""`apppot run` and `apppot console`: one virtual machine, as if it were a program."""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from apppot.host.commands.options import machine_options, stream_options, surroundings_options, wish
from apppot.host.common.errors import UsageError
from apppot.host.common.frozen import frozen
from apppot.host.runs.prepare import PreparedRun
from apppot.host.runs.start import STARTED, conclude, run_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from apppot.host.runs.recorder import Recorder
    from apppot.host.runs.wish import Wish


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `run` and `console`; what stands after IMAGE belongs to the command."""
    console = parser.prog.endswith(" console")
    parser.usage = f"{parser.prog} [OPTION]… IMAGE" + ("" if console else " [COMMAND [ARG]…]")
    machine_options(parser)
    surroundings_options(parser)
    stream_options(parser)
    parser.add_argument("image", metavar="IMAGE", help="name[:version], digest, file, or `host`")
    parser.add_argument(
        "argv", metavar="COMMAND", nargs=argparse.REMAINDER, help="default: the image's own"
    )
    parser.set_defaults(func=main, console=console)


def main(args: argparse.Namespace) -> int:
    """Run one virtual machine; returns the payload's exit status."""
    if args.gpu is not None:
        raise UsageError(
            "a GPU of the host cannot be reached from a virtual machine of AppPot",
            "run on the CPU, or use a container where the site offers one",
        )
    asked = wish(args)
    if args.explain:
        from apppot.host.commands.explain import explain

        with contextlib.ExitStack() as stack:
            explain(PreparedRun(asked, stack), sys.stdout, as_json=args.json)
        return 0
    reports = Reports(args.timeline, args.json)
    return run_wish(asked, name=args.name, detach=args.detach, reports=reports)


@frozen
class Reports:
    """What is told of a run that has ended, beside its status."""

    timeline: str | None = None  # a file
    as_json: bool = False  # on stderr


def run_wish(
    asked: Wish, *, name: str | None = None, detach: bool = False, reports: Reports | None = None
) -> int:
    """Run what is asked for, under `name` where it has one; returns the payload's exit status."""
    reports = reports or Reports()
    if detach:
        from apppot.host.runs import detached

        return detached.start(
            lambda recorder: _run_claimed(asked, recorder, reports),
            partial(_recorder, asked, name),
        )
    if name is None:
        return _run(asked, lambda: _recorder(asked, None), reports)
    recorder = _recorder(asked, name)
    recorder.claim()
    return _run_claimed(asked, recorder, reports)


def _recorder(asked: Wish, name: str | None, **options: Any) -> Recorder:
    """The run's record, made in the process that the run is of."""
    from apppot.host.runs.recorder import Recorder

    command = [word.decode(errors="replace") for word in asked.argv]
    return Recorder(asked.image or (asked.cow or ("",))[0], command, name, **options)


def _run_claimed(asked: Wish, recorder: Recorder, reports: Reports) -> int:
    """Run it, with its end in a record that stays."""
    from apppot.host.runs.recorder import status_of

    try:
        status = _run(asked, lambda: recorder, reports)
    except BaseException as error:
        recorder.ended(status_of(error), f"{error}" or type(error).__name__)
        raise
    recorder.ended(status)
    return status


def _run(asked: Wish, open_recorder: Callable[[], Recorder], reports: Reports) -> int:
    with contextlib.ExitStack() as stack:
        record = run_first(PreparedRun(asked, stack), open_recorder)
    status = conclude(record)
    if reports.timeline or reports.as_json:
        from apppot.host.runs import timeline

        steps = timeline.steps(record, STARTED)
        if reports.timeline:
            timeline.write(steps, reports.timeline)
        if reports.as_json:
            timeline.print_json(record, steps, status)
    return status
