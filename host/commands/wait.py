"""`apppot wait`: the end of runs, and their status."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `wait`."""
    parser.add_argument("names", metavar="NAME", nargs="+", help="name or id of a run")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Wait for all of them; the last status that is not 0."""
    from apppot.host.runs import records

    status = 0
    for record in [records.find(name) for name in args.names]:
        records.await_end(record)
        status = _status(record.folder, record.name) or status
    return status


def _status(folder: str, name: str) -> int:
    """What the run returned.  Raises RunError where nobody knows."""
    from apppot.host.runs import records

    record = records.read(folder)
    if record is None:
        raise records.RunError(
            f"the status of run {name} went to who started it",
            "wait for runs that have a name, or were started with --detach",
        )
    if record.status is None:
        raise records.RunError(f"run {name} is lost: its launcher was killed", "start it anew")
    return record.status
