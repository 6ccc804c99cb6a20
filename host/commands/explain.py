"""`apppot run --explain`: every value with its origin, and the command line; starts nothing."""

from __future__ import annotations

import json
import os
import shlex
from typing import IO, TYPE_CHECKING

from apppot.host.machine.preview import command_line

if TYPE_CHECKING:
    from apppot.host.runs.prepare import PreparedRun
    from apppot.host.warm.store import Kept


def explain(prepared: PreparedRun, out: IO[str], *, as_json: bool) -> None:
    """Print settings, what the guest sees of the host, and the argv."""
    kept = prepared.kept()
    argv = _argv(prepared, kept)
    if as_json:
        out.write(json.dumps(_document(prepared, kept, argv), indent=1) + "\n")
        return
    for name, setting in prepared.settings.items():
        if setting.value is not None:
            out.write(f"{name:14} {setting.value!s:24} {setting.origin}\n")
    out.write(f"{'start':14} {_start(kept)}\n")
    job = prepared.plan.job
    out.write(f"{'hypervisor':14} {prepared.hypervisor.name:24} chosen\n")
    out.write(f"{'kernel':14} {prepared.plan.kernel.release:24} {prepared.plan.kernel.path}\n")
    command = shlex.join(os.fsdecode(word) for word in job.argv) or "(a login shell)"
    out.write(f"{'command':14} {command}\n")
    for item in prepared.plan.shown:
        mode = "rw" if item.writable else "ro"
        out.write(f"{'shows':14} {item.name:12} {mode} {item.source}\n")
    if prepared.plan.copied is not None:
        out.write(f"{'copies':14} {prepared.plan.copied}\n")
    for warning in prepared.plan.warnings:
        out.write(f"{'warning':14} {warning}\n")
    out.write(shlex.join(argv) + "\n")


def _argv(prepared: PreparedRun, kept: Kept | None) -> list[str]:
    if kept is None:
        return command_line(prepared.plan)
    from apppot.host.warm.machine import resumed

    return command_line(resumed(prepared.keepable(), kept), resumes=True)


def _start(kept: Kept | None) -> str:
    """Whether it would boot, or resume from a machine that is kept."""
    return "boots" if kept is None else f"resumes from {kept.key[:12]} of {kept.created}"


def _document(prepared: PreparedRun, kept: Kept | None, argv: list[str]) -> dict[str, object]:
    plan = prepared.plan
    return {
        "version": 1,
        "settings": {
            name: {"value": setting.value, "origin": setting.origin}
            for name, setting in prepared.settings.items()
        },
        "hypervisor": prepared.hypervisor.name,
        "start": _start(kept),
        "kernel": {"release": plan.kernel.release, "path": plan.kernel.path},
        "command": [os.fsdecode(word) for word in plan.job.argv],
        "shown": {i.name: {"source": i.source, "writable": i.writable} for i in plan.shown},
        "warnings": list(plan.warnings),
        "argv": argv,
    }
