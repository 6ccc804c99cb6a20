"""Hypervisors behind one Protocol, one file each."""

from __future__ import annotations

from apppot.host.config import Setting
from apppot.host.errors import HypervisorError
from apppot.host.hypervisor.base import Hypervisor
from apppot.host.hypervisor.uml import Uml

KNOWN: tuple[type[Uml], ...] = (Uml,)


def choose(setting: Setting) -> Hypervisor:
    """The hypervisor to start on.  Raises HypervisorError with every verdict where none serves."""
    candidates = [kind() for kind in KNOWN if setting.value in ("auto", kind.name)]
    if not candidates:
        names = ", ".join(kind.name for kind in KNOWN)
        raise HypervisorError(
            f"{setting.origin}: this version cannot start {setting.value}", f"it knows {names}"
        )
    reasons = []
    for candidate in candidates:
        verdict = candidate.verdict()
        if verdict.usable:
            return candidate
        reasons.append(f"{candidate.name}: {verdict.reason}")
    raise HypervisorError("no hypervisor is usable here: " + "; ".join(reasons))
