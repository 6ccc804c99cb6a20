"""User-Mode Linux: the guest kernel is an ordinary process."""

from __future__ import annotations

import platform

from apppot.guest.protocol import frames
from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.hypervisor.base import Descriptors, HypervisorName, Share, Surroundings, Verdict
from apppot.host.hypervisor.launchplan import Disk, LaunchPlan

CHANNEL = "/dev/ttyS0"
# Its own files beside the memory: mconsole socket and pid file.
_OWN_FILES = 8 << 20


class Uml:
    """User-Mode Linux on x86-64."""

    name = HypervisorName.UML
    kernel = "uml"
    devices = tuple(f"/dev/ubd{letter}" for letter in "abcdefghijklmnop")
    share: Share | None = Share.HOSTFS
    shows_root = True
    network_device: str | None = "vec0"
    network_by_descriptor = False
    host_memory = True
    monitored = False
    # A serial line takes input at 2 MB/s.
    exchange = True
    window = frames.INPUT_CREDIT
    pinned = True
    confinable = True
    guarded = False

    def __init__(self, host: Capabilities) -> None:
        pass

    def verdict(self) -> Verdict:
        machine = platform.machine()
        if machine != "x86_64":
            return Verdict(False, f"User-Mode Linux needs x86_64, this is {machine}")
        return Verdict(True, "needs nothing of the host")

    def without_servers(self) -> Uml:
        return self

    def surroundings(self, plan: LaunchPlan) -> Surroundings:
        return Surroundings(plan.memory + _OWN_FILES, libraries=plan.kernel.libraries)

    def argv(
        self, plan: LaunchPlan, view: str, scratch_dir: str, inherited: Descriptors
    ) -> list[str]:
        kernel = plan.kernel
        words = [f"{view}/kernel", f"mem={plan.memory >> 10}K"]
        words += [_disk(number, disk, view) for number, disk in enumerate(plan.disks)]
        words += ["root=/dev/ubda", "ro", "rootfstype=ext4", "init=/sbin/apppot-init"]
        words += ["con=null", "con0=null,fd:2", f"ssl0=fd:{inherited.channel}", "ssl=null"]
        words += [f"uml_dir={scratch_dir}/", "umid=vm"]
        if plan.network_helper is not None:
            words.append(f"vec0:transport=bess,dst={view}/net/bess.sock,depth=64,gro=1,mtu=1500")
        if "seccomp" in kernel.features:
            words.append("seccomp=on")
        if "ncpus" in kernel.features and plan.cpus > 1:
            words.append(f"ncpus={plan.cpus}")
        if kernel.lpj is not None:
            words.append(f"lpj={kernel.lpj}")
        words += plan.extra
        words += [f"apppot.drive={self.devices[1]}", f"apppot.channel={CHANNEL}"]
        return words


def _disk(number: int, disk: Disk, view: str) -> str:
    # s: no lock on the file, which many guests and file systems without locks share; c: a COW
    # header in the file is the user's data unless the plan says otherwise.
    path = f"{view}/{disk.view_name}"
    if disk.backing is not None:
        return f"ubd{number}={path},{view}/{disk.backing}"
    flags = "c" if disk.writable else "rsc"
    return f"ubd{number}{flags}={path}"
