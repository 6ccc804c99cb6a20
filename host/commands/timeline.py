"""`apppot timeline`: show a timeline that a run wrote, in the terminal or as a picture."""

from __future__ import annotations

import argparse
import sys


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `timeline`."""
    parser.add_argument("file", metavar="FILE", help="what `apppot run --timeline FILE.json` wrote")
    parser.add_argument("-o", "--output", metavar="FILE.svg", help="draw it there instead")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Print or draw the timeline."""
    from apppot.host.runs import timeline

    steps = timeline.read(args.file)
    if args.output:
        timeline.write(steps, args.output)
    else:
        sys.stdout.write(timeline.text(steps))
    return 0
