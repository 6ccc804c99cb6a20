"""How fast a machine starts: ours step by step, the bare kernel, the stock kernel, sysvinit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from apppot.host.pot.layout import Kernel, find_kernel

from benchmarks import sysvinit
from benchmarks.machines import IMAGE, Bench, apppot_run, bare_kernel, floor_root, stock
from benchmarks.measure import Row, interleaved, launch, row

# Seconds, from the design.
TO_PAYLOAD, WHOLE, LAUNCHER, AGENT, FLOORS = 0.100, 0.220, 0.060, 0.040, 3.0
GROUP = "boot"


def measure(given: Bench) -> list[Row]:
    """Rows about the start of machines."""
    subjects = {"apppot": lambda: timeline(given.folder), "floor": lambda: floor(given)}
    found = interleaved(subjects, given.rounds(10, 30))
    ours, bare = found["apppot"], found["floor"]["whole"]
    to_payload = ours["hypervisor to payload"]
    rows = [
        row(GROUP, "bare kernel: C init powers off (floor)", bare, "s"),
        row(GROUP, "hypervisor's exec to payload's exec", to_payload, "s", budget=TO_PAYLOAD,
            base=bare, against="floor"),
        row(GROUP, "the same, as multiple of the floor", ratios(to_payload, bare), "×",
            budget=FLOORS),
        row(GROUP, "whole `apppot run IMAGE true`", ours["whole"], "s", budget=WHOLE),
        row(GROUP, "launcher before the hypervisor", ours["launcher"], "s", budget=LAUNCHER),
        row(GROUP, "agent: first line to payload's exec", ours["agent"], "s", budget=AGENT),
    ]  # fmt: skip
    steps = [name for name in ours if name.startswith("step ")]
    rows += [row("steps", name.removeprefix("step "), ours[name], "s") for name in steps]
    return rows + _stock(given, bare) + _sysvinit(given, to_payload)


def ratios(values: list[float], base: list[float]) -> list[float]:
    """Each value over its neighbour in time."""
    return [value / other for value, other in zip(values, base, strict=True)]


def timeline(folder: Path, *options: str) -> Mapping[str, float]:
    """One `apppot run IMAGE true`: seconds of its parts and of every step."""
    report = folder / "timeline.json"
    argv = apppot_run(IMAGE, "true", options=("--timeline", str(report), *options))
    whole = launch(argv, cwd=folder).seconds
    return {"whole": whole, **parts(report)}


def parts(report: Path) -> dict[str, float]:
    """Seconds of the parts and steps of the run that wrote the timeline `report`."""
    steps = json.loads(report.read_text())
    started = next(step[2] for step in steps if step[0] == "kernel")
    first_line = next(step[2] for step in steps if step[0] == "agent")
    payload = next(step[2] for step in steps if step[0] == "payload")
    return {
        "launcher": started,
        "hypervisor to payload": payload - started,
        "agent": payload - first_line,
        **{f"step {lane}: {name}": end - begin for lane, name, begin, end in steps},
    }


def floor(given: Bench, kernel: Kernel | None = None) -> Mapping[str, float]:
    """One boot of a bare kernel to an init that powers off, pinned as the launcher does."""
    argv = bare_kernel(kernel or find_kernel(), floor_root(given), given.folder)
    cpu = frozenset([max(os.sched_getaffinity(0))])
    return {"whole": launch(argv, cpus=cpu, may_fail=True).seconds}


def _stock(given: Bench, bare: list[float]) -> list[Row]:
    kernel = stock()
    if kernel is None:
        return []
    command = apppot_run(IMAGE, "true", options=("--kernel", kernel.path))
    subjects = {
        "floor": lambda: floor(given, kernel),
        "apppot": lambda: {"whole": launch(command, cwd=given.folder).seconds},
    }
    found = interleaved(subjects, given.rounds(2, 5))
    name = f"Debian's stock kernel {kernel.release}"
    return [
        row(GROUP, f"{name}: C init powers off", found["floor"]["whole"], "s", base=bare,
            against="floor"),
        row(GROUP, f"{name}: whole `apppot run IMAGE true`", found["apppot"]["whole"], "s"),
    ]  # fmt: skip


def _sysvinit(given: Bench, to_payload: list[float]) -> list[Row]:
    kernel = stock()
    if kernel is None or not given.full:
        return []
    image = sysvinit.image(given.folder)
    found = interleaved({"sysvinit": lambda: sysvinit.boot(given, kernel, image)}, 2)["sysvinit"]
    name = "sysvinit on the stock kernel, the original's way"
    return [
        row(GROUP, f"{name}: launch to payload", found["payload"], "s", base=to_payload,
            against="hypervisor to payload"),
        row(GROUP, f"{name}: whole", found["whole"], "s"),
    ]  # fmt: skip
