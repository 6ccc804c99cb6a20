"""`apppot logs`: what a run in the background has written."""

from __future__ import annotations

import argparse
import os

_POLL_SECONDS = 0.1


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `logs`."""
    parser.add_argument("-f", "--follow", action="store_true", help="until the run has ended")
    parser.add_argument("name", metavar="NAME", help="name or id of a run")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Its stdout to ours, its stderr to ours."""
    from apppot.host.runs import records

    record = records.find(args.name)
    if not record.detached:
        raise records.RunError(
            f"run {record.name} keeps no logs: its output goes to who started it",
            "only runs in the background (--detach) have logs",
        )
    logs = [(_open(record.log(stream)), number) for number, stream in enumerate(_STREAMS, 1)]
    while args.follow:
        # Asked before the logs are read: what a run wrote before it ended is in them.
        ended = records.await_end(record, _POLL_SECONDS)
        for fd, number in logs:
            _pass_on(fd, number)
        if ended:
            break
    for fd, number in logs:
        _pass_on(fd, number)
    return 0


_STREAMS = ("stdout", "stderr")


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _pass_on(fd: int, number: int) -> None:
    from apppot.host.common.files import write_all

    while data := os.read(fd, 1 << 18):
        write_all(number, data)
