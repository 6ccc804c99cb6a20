"""`apppot rm`: the records of runs that have ended."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `rm`."""
    parser.add_argument("names", metavar="NAME", nargs="+", help="name or id of a run")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Remove all of them, or none where one is unknown or under way."""
    from apppot.host.runs import records

    for record in records.removable(args.names):
        records.remove(record)
    return 0
