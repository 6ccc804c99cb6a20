"""`apppot run` and `apppot console`: one virtual machine, as if it were a program."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from apppot.host.commands.options import machine_options, stream_options, surroundings_options
from apppot.host.common.errors import UsageError
from apppot.host.runs.kernels import learn_calibration
from apppot.host.runs.prepare import Prepared
from apppot.host.runs.start import STARTED, run_first

if TYPE_CHECKING:
    from collections.abc import Callable

    from apppot.host.machine.run import Run
    from apppot.host.runs.recorder import Book


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
    if args.explain:
        from apppot.host.commands.explain import explain

        with contextlib.ExitStack() as stack:
            explain(Prepared(args, stack), sys.stdout, as_json=args.json)
        return 0
    if getattr(args, "detach", False):
        from apppot.host.runs import detached

        args.no_stdin = True
        return detached.start(lambda book: _run_claimed(args, book), partial(_book, args))
    if getattr(args, "name", None) is None:
        return _run(args, lambda: _book(args))
    book = _book(args)
    book.claim()
    return _run_claimed(args, book)


def _book(args: argparse.Namespace, **options: Any) -> Book:
    """The run's record, made in the process that the run is of."""
    from apppot.host.runs.recorder import Book

    command = [os.fsencode(word).decode(errors="replace") for word in args.argv]
    return Book(str(args.image), command, getattr(args, "name", None), **options)


def _run_claimed(args: argparse.Namespace, book: Book) -> int:
    """Run it, with its end in a record that stays."""
    from apppot.host.runs.recorder import status_of

    try:
        status = _run(args, lambda: book)
    except BaseException as error:
        book.ended(status_of(error), f"{error}" or type(error).__name__)
        raise
    book.ended(status)
    return status


def _run(args: argparse.Namespace, open_book: Callable[[], Book]) -> int:
    with contextlib.ExitStack() as stack:
        record = run_first(Prepared(args, stack), open_book)
    return _report(record, args)


def _report(record: Run, args: argparse.Namespace) -> int:
    from apppot.host.channel import outcome
    from apppot.host.channel.outcome import exit_code

    assert record.outcome is not None
    complaint = outcome.complaint(record.outcome)
    if complaint:
        sys.stderr.write(f"apppot: {complaint}\n")
    status = exit_code(record.outcome)
    learn_calibration(record)
    if args.timeline or args.json:
        from apppot.host.runs import timeline

        steps = timeline.steps(record, STARTED)
        if args.timeline:
            timeline.write(steps, args.timeline)
        if args.json:
            timeline.print_json(record, steps, status)
    return status
