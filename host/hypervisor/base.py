"""What the launcher asks of a hypervisor."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from apppot.host.common.frozen import frozen

if TYPE_CHECKING:
    from apppot.host.hypervisor.launchplan import LaunchPlan


class HypervisorName(StrEnum):
    """What users call a hypervisor: the words of `--hypervisor`, but for `auto`."""

    UML = "uml"
    KVM = "kvm"
    XEN = "xen"
    QEMU = "qemu"


class Share(StrEnum):
    """How a guest sees directories of this host; `guest.shares` knows the same words."""

    HOSTFS = "hostfs"  # User-Mode Linux reads them itself, by path
    NINEP = "9p"
    XEN_NINEP = "xen9p"
    VIRTIOFS = "virtiofs"


@frozen
class Verdict:
    """Whether a hypervisor can be tried here; `reason` says why (not), `remedy` what would help."""

    usable: bool
    reason: str
    remedy: str = ""


@frozen
class Surroundings:
    """What a hypervisor's process needs of the host beside what its plan shows."""

    temporary: int  # bytes of a private memory file system
    programs: bool = False  # the host's programs and libraries
    libraries: tuple[str, ...] = ()  # just these files
    devices: tuple[str, ...] = ()  # device nodes


@frozen
class Descriptors:
    """Descriptors that a hypervisor's process inherits."""

    channel: int
    network: int | None = None  # the network helper's socket, where it takes a descriptor
    monitor: int | None = None  # where it has one
    memory: int | None = None  # the guest's memory, where the launcher made its file
    devices: int | None = None  # state of a machine that goes on; it waits for an order to
    files: tuple[tuple[str, int], ...] = ()  # tag and file server of each directory that has one

    def all(self) -> list[int]:
        """All of them."""
        ours = (self.channel, self.network, self.monitor, self.memory, self.devices)
        return [fd for fd in (*ours, *dict(self.files).values()) if fd is not None]


class Hypervisor(Protocol):
    """One kind of virtual machine on a host.  Pure: it decides words, the launcher starts them."""

    name: HypervisorName
    kernel: str  # which of the pot's kernels it boots
    devices: tuple[str, ...]  # the guest's name of each disk of a plan, in order
    share: Share | None  # how the guest sees directories of the host; None: it cannot
    shows_root: bool  # the host's root, which is many file systems, can be shared
    network_device: str | None  # the guest's name of its interface; None: it has none
    network_by_descriptor: bool  # the launcher connects it to the network helper
    host_memory: bool  # a guest's memory is this host's
    monitored: bool  # it takes orders by QMP
    exchange: bool  # much input goes through files in a shared directory
    window: int  # bytes of input that may be under way in the channel
    pinned: bool  # a guest with one CPU is faster on a CPU of its own
    confinable: bool  # its process can be held; else the guest's boundary is the hypervisor alone
    guarded: bool  # its process has to clean up: it is asked to end, and waited for

    def verdict(self) -> Verdict:
        """A cheap probe; what it cannot rule out is proven by the guest's HELLO."""
        ...

    def without_servers(self) -> Hypervisor:
        """The same without file servers beside it: its own serves many file systems as one, and
        its state can be kept."""
        ...

    def surroundings(self, plan: LaunchPlan) -> Surroundings:
        """What its process needs of the host."""
        ...

    def argv(
        self, plan: LaunchPlan, view: str, scratch_dir: str, inherited: Descriptors
    ) -> list[str]:
        """The command line that starts `plan`.

        `view` is the directory of the plan's shown paths and `scratch_dir` a private writable
        one, both as the hypervisor's process sees them.
        """
        ...
