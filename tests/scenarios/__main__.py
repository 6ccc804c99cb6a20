"""`python -m tests.scenarios --hypervisor uml`: run the suite, print a table."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.scenarios import suite
from tests.scenarios.runner import HYPERVISORS, IMAGE, Runner, build_proven, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.scenarios")
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help="only these")
    parser.add_argument("--hypervisor", choices=HYPERVISORS, required=True)
    parser.add_argument("--image", default=IMAGE, help="the base image: a name or a path")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one scenario")
    parser.add_argument("--proven", type=Path, help="the compiled proven.c")
    parser.add_argument("--also", type=Path, help="a file with more scenarios")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    asked = parser.parse_args()
    known = suite.load() + (suite.load(asked.also) if asked.also else ())
    chosen = [item for item in known if not asked.names or item.name in asked.names]
    if unknown := set(asked.names) - {item.name for item in chosen}:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory(prefix="scenarios-") as place:
        proven = asked.proven or build_proven(Path(place) / "proven")
        runner = Runner(asked.hypervisor, Path(place), proven, asked.limit, asked.image)
        results = []
        for scenario in chosen:
            results.append(runner.run(scenario))
            sys.stdout.write(table(results[-1:]))
            sys.stdout.flush()
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    failed = sum(bool(result.problem) for result in results)
    print(
        f"{asked.hypervisor}: {len(results) - failed} of {len(results)} scenarios as they must be"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
