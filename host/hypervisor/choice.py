"""Which hypervisors there are, and which of them can be tried here."""

from __future__ import annotations

from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.common.errors import HypervisorError
from apppot.host.config.settings import Setting
from apppot.host.hypervisor.base import Hypervisor, Verdict
from apppot.host.hypervisor.qemu import Kvm, Qemu
from apppot.host.hypervisor.uml import Uml
from apppot.host.hypervisor.xen import Xen

# In the order in which `auto` tries them.
KNOWN: tuple[type[Uml | Qemu | Xen], ...] = (Kvm, Xen, Uml, Qemu)


def probed(host: Capabilities) -> list[tuple[Hypervisor, Verdict]]:
    """Every hypervisor with what a cheap probe says of it."""
    found: list[Hypervisor] = [kind(host) for kind in KNOWN]
    return [(hypervisor, hypervisor.verdict()) for hypervisor in found]


def candidates(setting: Setting[str], host: Capabilities) -> list[Hypervisor]:
    """What can be tried, the best first.  Raises HypervisorError with every verdict if nothing."""
    asked = [pair for pair in probed(host) if setting.value in ("auto", pair[0].name)]
    if not asked:
        names = ", ".join(kind.name for kind in KNOWN)
        raise HypervisorError(
            f"{setting.origin}: this version cannot start {setting.value}", f"it knows {names}"
        )
    usable = [hypervisor for hypervisor, verdict in asked if verdict.usable]
    if not usable:
        reasons = "; ".join(f"{one.name}: {verdict.reason}" for one, verdict in asked)
        remedies = "; ".join(verdict.remedy for _, verdict in asked if verdict.remedy)
        raise HypervisorError(f"no hypervisor is usable here: {reasons}", remedies)
    return usable
