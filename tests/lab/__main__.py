"""`python -m tests.lab`: the scenario suite on real KVM and real Xen, and a table of results.

With `--script`, run something else in a lab, for instance a shell's line by hand.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from tests.lab import image
from tests.lab.machine import KEPT, Kind, LabError
from tests.lab.report import Column, table
from tests.lab.trial import run_suite, start
from tests.scenarios.runner import IMAGE


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab")
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help="only these")
    parser.add_argument("--only", type=Kind, choices=list(Kind), help="this one, not all of them")
    parser.add_argument(
        "--image", default=IMAGE, help="the base image: one of the store, or musl, which is made"
    )
    parser.add_argument("--script", help="run this in the lab instead of the suite")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    asked = parser.parse_args()
    # As an interrupt does: a lab's directory goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    kinds = [asked.only] if asked.only else list(Kind)
    parts = image.build()
    if asked.script is not None:
        with start(kinds[0], parts) as lab:
            return lab.run(asked.script, limit=3600)
    columns = []
    for kind in kinds:
        try:
            columns.append(run_suite(kind, parts, asked.names, asked.image))
        except LabError as error:
            columns.append(Column(kind, "", f"{error}\n  the console is in {KEPT}", (), 0.0))
    sys.stdout.write(table(columns))
    if asked.json is not None:
        asked.json.write_text(json.dumps([column.fields() for column in columns], indent=1) + "\n")
    return 0 if all(column.passed() for column in columns) else 1


if __name__ == "__main__":
    sys.exit(main())
