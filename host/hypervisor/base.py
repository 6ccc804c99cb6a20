"""What the launcher asks of a hypervisor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from apppot.host.plan import LaunchPlan


@dataclass(frozen=True)
class Verdict:
    """Whether a hypervisor can be tried here; `reason` says why (not), `remedy` what would help."""

    usable: bool
    reason: str
    remedy: str = ""


class Hypervisor(Protocol):
    """One kind of virtual machine.  Pure: it decides words, the launcher starts them."""

    name: str
    devices: tuple[str, ...]  # the guest's name of each disk of a plan, in order
    shares: bool  # directories of the host can be shown in the guest

    def verdict(self) -> Verdict:
        """A cheap probe; what it cannot rule out is proven by the guest's HELLO."""
        ...

    def argv(self, plan: LaunchPlan, view: str, scratch_dir: str, channel_fd: int) -> list[str]:
        """The command line that starts `plan`.

        `view` is the directory of the plan's shown paths and `scratch_dir` a private writable
        one, both as the hypervisor's process sees them.
        """
        ...
