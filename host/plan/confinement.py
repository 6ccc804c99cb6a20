"""Which confinement a run gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apppot.host.common.errors import HypervisorError, Unsuited
from apppot.host.confinement.sandbox import Confinement, Method
from apppot.host.hypervisor.base import Hypervisor

if TYPE_CHECKING:
    from apppot.host.capabilities.capabilities import Capabilities


def choose(wish: str, capabilities: Capabilities, *, as_root: bool) -> Method:
    """How to confine here, for a wish of `WISHES`; HypervisorError when it cannot be had.

    `as_root`: the launcher is uid 0.
    """
    if wish == "off":
        return Method(Confinement.NONE)
    if capabilities.bwrap is not None and wish != Confinement.LANDLOCK:
        return Method(Confinement.BUBBLEWRAP, capabilities.bwrap, as_root)
    if capabilities.landlock and wish != Confinement.BUBBLEWRAP:
        return Method(Confinement.LANDLOCK)
    if wish == "auto":
        return Method(Confinement.NONE)
    reason = "" if wish == Confinement.LANDLOCK else capabilities.bwrap_reason
    raise HypervisorError(
        f"--confine {wish}: {reason or 'the kernel of this host has no Landlock'}",
        "install bubblewrap and allow unprivileged user namespaces, or use a kernel with Landlock",
    )


def confinement_wish(
    wish: str, hypervisor: Hypervisor, *, host_image: bool, uid: int, landlock: int
) -> str:
    """The confinement to ask for.  Raises Unsuited where a hypervisor cannot have it.

    In an ordinary user's namespace all that is not his own shows as nobody's.  For the host's
    root that would be wrong nearly everywhere, so Landlock goes first there.
    """
    if not hypervisor.confinable:
        if wish not in ("auto", "off"):
            raise Unsuited(
                f"--confine {wish}: the processes of {hypervisor.name} are the administrator's, "
                "nothing holds them",
                "leave it at auto, or use another hypervisor",
            )
        return "off"
    if wish == "auto" and host_image and uid != 0 and landlock:
        return "landlock"
    return wish
