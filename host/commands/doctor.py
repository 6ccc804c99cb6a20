"""`apppot doctor`: what this machine can do, and what to mend."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from apppot.host.common.errors import EXIT_FAILED
from apppot.host.doctor.boot import boot, calibrate

if TYPE_CHECKING:
    from apppot.host.doctor.checks import Check
    from apppot.host.runs.timeline import Step

_COLOURS = {"ok": "32", "warn": "33", "fail": "31"}
_NAME_WIDTH = 21


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `apppot doctor`."""
    parser.add_argument("--mem", dest="memory", metavar="SIZE", help="guest memory to judge for")
    parser.add_argument("--boot", action="store_true", help="start a guest too, and time it")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Judge, print; 0 when a guest can run here, EXIT_FAILED otherwise."""
    from apppot.host.common import paths
    from apppot.host.config.settings import Options, resolve
    from apppot.host.doctor import checks as doctor
    from apppot.host.doctor.facts import gather

    settings = resolve(Options(memory=args.memory), os.environ, paths.config_files())
    facts = gather(settings)
    checks = doctor.examine(facts)
    steps: list[Step] = []
    if args.boot and doctor.usable(checks):
        if facts.kernel is not None:
            calibrate(facts.kernel, facts.lpj)
        check, steps = boot(args.memory)
        checks.append(check)
    if args.json:
        print(json.dumps(as_data(checks, steps), indent=1))
    else:
        sys.stdout.write(as_text(checks, steps, colour=sys.stdout.isatty()))
    return 0 if doctor.usable(checks) else EXIT_FAILED


def as_data(checks: list[Check], steps: list[Step]) -> dict[str, object]:
    """The verdicts for scripts; times in seconds."""
    from apppot.host.doctor.checks import usable

    rows = [
        {"name": c.name, "verdict": str(c.mark), "reason": c.reason, "remedy": c.remedy}
        for c in checks
    ]
    data: dict[str, object] = {"version": 1, "usable": usable(checks), "checks": rows}
    if steps:
        data["timeline"] = [[step.lane, step.name, step.start, step.end] for step in steps]
    return data


def as_text(checks: list[Check], steps: list[Step], *, colour: bool) -> str:
    """The verdicts for people."""
    lines = []
    for check in checks:
        word = f"{check.mark:4}"
        if colour:
            word = f"\033[{_COLOURS[check.mark]}m{word}\033[0m"
        lines.append(f"{word}  {check.name:{_NAME_WIDTH}}  {check.reason}")
        if check.remedy:
            lines.append(f"{'':6}{'':{_NAME_WIDTH}}  remedy: {check.remedy}")
    lines += [f"{'':6}{_step_line(step)}" for step in steps]
    return "\n".join([*lines, _summary(checks)]) + "\n"


def _step_line(step: Step) -> str:
    return f"{1000 * step.start:7.1f} ms  {1000 * (step.end - step.start):6.1f} ms  " + (
        f"{step.lane}: {step.name}"
    )


def _summary(checks: list[Check]) -> str:
    counts = [sum(check.mark == mark for check in checks) for mark in ("warn", "fail")]
    can = "cannot" if counts[1] else "can"
    return f"a guest {can} run here (failures: {counts[1]}, warnings: {counts[0]})"
