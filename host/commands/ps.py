"""`apppot ps`: the runs of this user."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

_WIDTH = 40


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ps`."""
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """List all runs that have a record, the oldest first."""
    from apppot.host.common.text import printable
    from apppot.host.runs import records

    found = [(record, records.state(record)) for record in records.list_runs()]
    if args.json:
        rows = [{**asdict(record), "state": str(state)} for record, state in found]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return 0
    sys.stdout.write(f"{'NAME':16} {'IMAGE':16} {'STATE':11} {'CREATED':20} COMMAND\n")
    for record, state in found:
        word = str(state) if record.status is None else f"{state} ({record.status})"
        command = " ".join(record.command)
        shown = command if len(command) <= _WIDTH else f"{command[: _WIDTH - 1]}…"
        row = f"{record.name:16} {record.image:16} {word:11} {record.created:20} {printable(shown)}"
        sys.stdout.write(row.rstrip() + "\n")
    return 0
