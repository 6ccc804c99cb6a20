"""The hypervisor's argv as a start would make it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apppot.host.confinement import bubblewrap
from apppot.host.confinement.sandbox import Shown, unconfined
from apppot.host.hypervisor.base import Wires, shares
from apppot.host.machine import fileserver

if TYPE_CHECKING:
    from apppot.host.runs.prepare import Prepared


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
        sandbox = unconfined("RUNDIR/view", "RUNDIR/uml")
    own = prepared.hypervisor.argv(plan, sandbox.view, sandbox.temporary, _wires(prepared))
    return [*sandbox.prefix, *own]


def _wires(prepared: Prepared) -> Wires:
    by_descriptor = prepared.plan.network and prepared.hypervisor.network_by_descriptor
    tags = [tag for tag, _ in shares(prepared.plan)]
    served = tags if prepared.plan.job.share == fileserver.KIND else []
    files = tuple((tag, _NETWORK + number) for number, tag in enumerate(served, 1))
    return Wires(_CHANNEL, _NETWORK if by_descriptor else None, files=files)
