"""QEMU: on KVM where the host has one that works, else TCG, which needs nothing and is slow."""

from __future__ import annotations

import os
import platform
from dataclasses import replace

from apppot.guest.protocol import frames
from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.common.frozen import frozen
from apppot.host.hypervisor.base import Descriptors, HypervisorName, Share, Surroundings, Verdict
from apppot.host.hypervisor.launchplan import Disk, LaunchPlan, shares

PROGRAM = "qemu-system-x86_64"
KVM_DEVICE = "/dev/kvm"
CHANNEL = "/dev/vport0p1"
CHANNEL_NAME = "org.apppot.0"
INSTALL_HINT = "apt-get install qemu-system-x86"
# The first with `-netdev dgram` on a descriptor.
OLDEST = (7, 2)
_TEMPORARY = 64 << 20


@frozen
class Machine:
    """A kind of machine that starts a kernel directly (PVH), and where it has virtio devices."""

    name: str
    options: str
    bus: str  # what the names of its devices end in

    def lacks(self, host: Capabilities) -> list[str]:
        """What this host's QEMU would need to have for it."""
        if self.name not in host.qemu_machines:
            return [self.name]
        needed = (f"virtio-blk-{self.bus}", f"virtio-serial-{self.bus}", "virtserialport")
        return [name for name in needed if name not in host.qemu_devices]

    def share(self, host: Capabilities) -> Share | None:
        """The best way to show it directories of the host."""
        if host.virtiofsd is not None and f"vhost-user-fs-{self.bus}" in host.qemu_devices:
            return Share.VIRTIOFS
        return Share.NINEP if f"virtio-9p-{self.bus}" in host.qemu_devices else None

    def has_network(self, host: Capabilities) -> bool:
        return f"virtio-net-{self.bus}" in host.qemu_devices


# The first has neither firmware nor PCI, which takes a start less time.
MACHINES = (
    Machine("microvm", "pit=on,pic=on,rtc=on", "device"),
    Machine("q35", "vmport=off,usb=off,sata=off,smbus=off", "pci"),
)


def choose_machine(host: Capabilities) -> Machine | None:
    """The first that QEMU has all for, else the first that can be started; None: none can."""
    found = [machine for machine in MACHINES if not machine.lacks(host)]
    whole = [one for one in found if one.share(host) and one.has_network(host)]
    return next(iter([*whole, *found]), None)


class Qemu:
    """A machine without anything that a guest does not need."""

    name = HypervisorName.QEMU
    kernel = "x86_64"
    devices = tuple(f"/dev/vd{letter}" for letter in "abcdefghijklmnop")
    shows_root = True
    network_by_descriptor = True
    host_memory = True
    monitored = True
    exchange = False
    window = frames.PORT_CREDIT
    pinned = False
    confinable = True
    guarded = False
    accelerator = "tcg"
    cpu = "max"

    def __init__(self, host: Capabilities) -> None:
        self._host = host
        # Where there is none, `verdict` says so before anybody asks for more.
        self.machine = choose_machine(host) or MACHINES[0]
        self.share: Share | None = self.machine.share(host)
        self.network_device: str | None = "eth0" if self.machine.has_network(host) else None

    def verdict(self) -> Verdict:
        host = self._host
        machine = platform.machine()
        if machine != "x86_64":
            return Verdict(False, f"the pot has a kernel for x86_64, this is {machine}")
        if host.qemu is None:
            return Verdict(False, "qemu-system-x86_64 is not installed", INSTALL_HINT)
        if host.qemu_version < OLDEST:
            found, wanted = (".".join(map(str, v)) for v in (host.qemu_version, OLDEST))
            return Verdict(False, f"QEMU {found} is too old", f"install QEMU {wanted} or newer")
        if self.machine.lacks(host):
            missing = " and no ".join(", ".join(machine.lacks(host)) for machine in MACHINES)
            return Verdict(False, f"{host.qemu} has no {missing}", INSTALL_HINT)
        return self._accelerator_verdict()

    def _accelerator_verdict(self) -> Verdict:
        return Verdict(True, "emulation: needs nothing of the host, runs several times slower")

    def without_servers(self) -> Qemu:
        return type(self)(replace(self._host, virtiofsd=None))

    def surroundings(self, plan: LaunchPlan) -> Surroundings:
        return Surroundings(_TEMPORARY, programs=True)

    def argv(
        self, plan: LaunchPlan, view: str, scratch_dir: str, inherited: Descriptors
    ) -> list[str]:
        machine, bus = self.machine, self.machine.bus
        kind = f"{machine.name},accel={self.accelerator},{machine.options}"
        words = [self._host.qemu or PROGRAM, "-M", kind, "-cpu", self.cpu]
        words += ["-m", f"{plan.memory >> 10}K", "-smp", str(plan.cpus)]
        words += _memory(plan, inherited)
        if inherited.devices is not None:
            words += ["-incoming", "defer"]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += _SANDBOX
        words += ["-kernel", f"{view}/kernel", "-append", " ".join(self._append(plan))]
        words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        if inherited.monitor is not None:
            words += ["-chardev", f"socket,id=monitor,fd={inherited.monitor}"]
            words += ["-mon", "chardev=monitor,mode=control"]
        words += ["-device", f"virtio-serial-{bus},max_ports=2"]
        words += ["-chardev", f"socket,id=channel,fd={inherited.channel}"]
        words += ["-device", f"virtserialport,chardev=channel,name={CHANNEL_NAME},nr=1"]
        for number, disk in enumerate(plan.disks):
            words += _disk(number, disk, view, bus)
        servers = dict(inherited.files)
        for name, writable in shares(plan.job, plan.shown):
            if name in servers:
                words += _served(name, servers[name], bus)
            else:
                words += _share(name, f"{view}/{name}", writable, bus)
        if inherited.network is not None:
            words += ["-netdev", f"dgram,id=net,local.type=fd,local.str={inherited.network}"]
            # Nothing boots from it.
            rom = ",romfile=" if bus == "pci" else ""
            words += ["-device", f"virtio-net-{bus},netdev=net{rom}"]
        return words

    def _timer_words(self) -> list[str]:
        # The guest has the host's counter, and nothing to calibrate against that works in
        # emulation: where its rate is unknown, its clock is wrong, but it boots.
        return [f"tsc_early_khz={self._host.tsc_khz or 1_000_000}", "no_timer_check"]

    def _append(self, plan: LaunchPlan) -> list[str]:
        words = ["console=ttyS0", "quiet", "panic=-1", "reboot=t", *self._timer_words()]
        words += [f"root={self.devices[0]}", "ro", "rootfstype=ext4", "init=/sbin/apppot-init"]
        words += plan.extra
        return [*words, f"apppot.drive={self.devices[1]}", f"apppot.channel={CHANNEL}"]


class Kvm(Qemu):
    """QEMU with the processor's own virtualisation."""

    name = HypervisorName.KVM
    accelerator = "kvm"
    cpu = "host"

    def _accelerator_verdict(self) -> Verdict:
        if not os.path.exists(KVM_DEVICE):
            remedy = "load kvm_intel or kvm_amd, or switch virtualisation on in the firmware"
            return Verdict(False, f"there is no {KVM_DEVICE}", remedy)
        if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
            remedy = "ask the administrator to put you into the group that it belongs to"
            return Verdict(False, f"{KVM_DEVICE} is not yours to open", remedy)
        return Verdict(True, f"{KVM_DEVICE} opens; the first guest proves whether it works")

    def _timer_words(self) -> list[str]:
        return []

    def surroundings(self, plan: LaunchPlan) -> Surroundings:
        return Surroundings(_TEMPORARY, programs=True, devices=(KVM_DEVICE,))


_SANDBOX = (
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
)


def _memory(plan: LaunchPlan, inherited: Descriptors) -> list[str]:
    """The guest's memory, where QEMU's own would not do: what others read or write is shared."""
    size = f"id=memory,size={plan.memory >> 10}K"
    if inherited.memory is not None:
        path = f"/proc/self/fd/{inherited.memory}"
        back = f"memory-backend-file,{size},mem-path={path},share=on,align=2M"
    elif plan.huge or inherited.files:
        back = f"memory-backend-memfd,{size}"
        back += (",hugetlb=on" if plan.huge else "") + (",share=on" if inherited.files else "")
    else:
        return []
    return ["-object", back, "-machine", "memory-backend=memory"]


def _disk(number: int, disk: Disk, view: str, bus: str) -> list[str]:
    # No lock on the file: many guests share an image, and some file systems have none.
    back = f"driver=raw,node-name=disk{number},read-only={'off' if disk.writable else 'on'}"
    back += f",file.driver=file,file.filename={view}/{disk.view_name},file.locking=off"
    return ["-blockdev", back, "-device", f"virtio-blk-{bus},drive=disk{number}"]


def _share(tag: str, path: str, writable: bool, bus: str) -> list[str]:
    back = f"local,id={tag},path={path},security_model=none,multidevs=remap"
    back += "" if writable else ",readonly=on"
    return ["-fsdev", back, "-device", f"virtio-9p-{bus},fsdev={tag},mount_tag={tag}"]


def _served(tag: str, server: int, bus: str) -> list[str]:
    words = ["-chardev", f"socket,id={tag},fd={server}"]
    return [*words, "-device", f"vhost-user-fs-{bus},chardev={tag},tag={tag}"]
