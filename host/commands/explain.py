"""`apppot run --explain`: every value with its origin, and the command line; starts nothing."""

from __future__ import annotations

import json
import os
import shlex
from typing import IO, TYPE_CHECKING

from apppot.host.confinement import bubblewrap
from apppot.host.hypervisor.base import Wires, shares
from apppot.host.hypervisor.launchplan import Shown
from apppot.host.machine import fileserver

if TYPE_CHECKING:
    from apppot.host.commands.run import Prepared

# In a real start these are a run directory and descriptors.
_PRIVATE = tuple(Shown(name, f"RUNDIR/{name}") for name in ("exchange", "net", "run"))
_CHANNEL, _NETWORK = 3, 4


def command_line(prepared: Prepared) -> list[str]:
    """The hypervisor's argv as a start would make it, with RUNDIR for the run directory."""
    plan, bwrap = prepared.plan, prepared.capabilities.bwrap
    needs = prepared.hypervisor.surroundings(plan)
    if prepared.ground.mapped and bwrap is not None:
        sandbox = bubblewrap.bubblewrap(
            bwrap,
            (*plan.shown, *_PRIVATE),
            memory=needs.temporary,
            as_root=prepared.caller.uid == 0,
            system=needs.programs,
            libraries=needs.libraries,
            devices=needs.devices,
        )
    else:
        sandbox = bubblewrap.unconfined("RUNDIR/view", "RUNDIR/uml")
    own = prepared.hypervisor.argv(plan, sandbox.view, sandbox.temporary, _wires(prepared))
    return [*sandbox.prefix, *own]


def _wires(prepared: Prepared) -> Wires:
    by_descriptor = prepared.plan.network and prepared.hypervisor.network_by_descriptor
    tags = [tag for tag, _ in shares(prepared.plan)]
    served = tags if prepared.plan.job.share == fileserver.KIND else []
    files = tuple((tag, _NETWORK + number) for number, tag in enumerate(served, 1))
    return Wires(_CHANNEL, _NETWORK if by_descriptor else None, files=files)


def explain(prepared: Prepared, out: IO[str], *, as_json: bool) -> None:
    """Print settings, what the guest sees of the host, and the argv."""
    argv = command_line(prepared)
    if as_json:
        out.write(json.dumps(_document(prepared, argv), indent=1) + "\n")
        return
    for name, setting in prepared.settings.items():
        if setting.value is not None:
            out.write(f"{name:14} {setting.value!s:24} {setting.origin}\n")
    out.write(f"{'start':14} {_start(prepared)}\n")
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


def _start(prepared: Prepared) -> str:
    """Whether it would boot, or resume from a machine that is kept."""
    kept = prepared.kept()
    return "boots" if kept is None else f"resumes from {kept.key[:12]} of {kept.created}"


def _document(prepared: Prepared, argv: list[str]) -> dict[str, object]:
    plan = prepared.plan
    return {
        "version": 1,
        "settings": {
            name: {"value": setting.value, "origin": setting.origin}
            for name, setting in prepared.settings.items()
        },
        "hypervisor": prepared.hypervisor.name,
        "start": _start(prepared),
        "kernel": {"release": plan.kernel.release, "path": plan.kernel.path},
        "command": [os.fsdecode(word) for word in plan.job.argv],
        "shown": {i.name: {"source": i.source, "writable": i.writable} for i in plan.shown},
        "warnings": list(plan.warnings),
        "argv": argv,
    }
