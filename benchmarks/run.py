"""`make bench`: measure, print a table, write JSON.

Every figure is a median; what is compared was run in turns.  Budgets are those of the design.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

# Run as a file: the packages are beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apppot.host.common.errors import ApppotError  # noqa: E402
from apppot.host.pot.layout import find_kernel  # noqa: E402

from benchmarks import boot, changes, guest, many, memory, qemu, repository, warm  # noqa: E402
from benchmarks.machines import Bench, bench  # noqa: E402
from benchmarks.measure import Row  # noqa: E402

BUSY = 0.5  # load average from which on figures are not those of a quiet machine
GROUPS: dict[str, Callable[[Bench], list[Row]]] = {
    "boot": boot.measure,
    "memory": memory.measure,
    "small": guest.small_costs,
    "programs": guest.whole_programs,
    "streams": guest.streams,
    "placement": guest.placement,
    "changes": changes.merge,
    "save": changes.save,
    "pull": repository.pull,
    "update": repository.update,
    "many": many.measure,
    "qemu": qemu.measure,
    "warm": warm.measure,
}


def main() -> int:
    """Measure what was asked for; 1 where a group could not be measured."""
    args = arguments()
    rows: list[Row] = []
    failed = 0
    with bench(not args.quick) as given:
        if os.getloadavg()[0] > BUSY:
            print("this machine is busy: trust ratios, not times", file=sys.stderr)
        warm_up()
        for name in args.only or GROUPS:
            print(f"measuring: {name} …", file=sys.stderr, flush=True)
            try:
                rows += GROUPS[name](given)
            except ApppotError as error:
                failed = 1
                print(f"{name}: {error}", file=sys.stderr)
    print(table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(report(rows, not args.quick), indent=1) + "\n")
    return failed


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller trees")
    parser.add_argument("--only", action="append", choices=GROUPS, help="this group only")
    return parser.parse_args()


def warm_up(size: int = 1 << 30) -> None:
    """Touch memory of the machine: its first use is several times slower than the second."""
    memory_file = os.memfd_create("warm-up")
    block = bytes(1 << 20)
    for _ in range(size // len(block)):
        os.write(memory_file, block)
    os.close(memory_file)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = []
    width = max((len(row.case) for row in rows), default=0)
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f"\n{group}")
        lines.append(f"  {row.case:<{width}}  {number(row.value):>9} {row.unit:<4}{remarks(row)}")
    return "\n".join(lines)


def remarks(row: Row) -> str:
    """Spread, ratio and budget of a row."""
    text = f"  [{number(row.low)} – {number(row.high)}]"
    if row.ratio is not None:
        text += f"  {row.ratio:.2f} × {row.against}"
    if row.budget is not None:
        text += f"  {row.verdict.upper()}: budget {number(row.budget)} {row.unit}"
    return text


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def report(rows: list[Row], full: bool) -> dict[str, object]:
    """The figures for scripts; values in the unit of each row."""
    return {
        "version": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "kernel": find_kernel().release,
        "host_kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "full": full,
        "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
