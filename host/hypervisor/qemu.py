"""QEMU: on KVM where the host has one that works, else TCG, which needs nothing and is slow."""

from __future__ import annotations

import os
import platform

from apppot.guest.protocol import frames
from apppot.host.capabilities import Capabilities
from apppot.host.hypervisor.base import Surroundings, Verdict, Wires, shares
from apppot.host.plan import Disk, LaunchPlan

PROGRAM = "qemu-system-x86_64"
KVM_DEVICE = "/dev/kvm"
CHANNEL = "/dev/vport0p1"
CHANNEL_NAME = "org.apppot.0"
INSTALL_HINT = "apt-get install qemu-system-x86"
# The first with `-netdev dgram` on a descriptor.
OLDEST = (7, 2)
_NEEDED = ("virtio-blk-device", "virtio-serial-device", "virtserialport", "virtio-9p-device")
_TEMPORARY = 64 << 20


class Qemu:
    """A `microvm`: no firmware, no PCI, the kernel started directly (PVH)."""

    name = "qemu"
    kernel = "x86_64"
    devices = tuple(f"/dev/vd{letter}" for letter in "abcdefghijklmnop")
    share: str | None = "9p"
    shows_root = True
    network_device = "eth0"
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
        if missing := [name for name in _NEEDED if name not in host.qemu_devices]:
            return Verdict(False, f"this QEMU has no {', '.join(missing)}", INSTALL_HINT)
        return self._accelerator_verdict()

    def _accelerator_verdict(self) -> Verdict:
        return Verdict(True, "emulation: needs nothing of the host, runs several times slower")

    def surroundings(self, plan: LaunchPlan) -> Surroundings:
        return Surroundings(_TEMPORARY, programs=True)

    def argv(self, plan: LaunchPlan, view: str, scratch_dir: str, wires: Wires) -> list[str]:
        words = [self._host.qemu or PROGRAM, "-M", self._machine(), "-cpu", self.cpu]
        words += ["-m", f"{plan.memory >> 10}K", "-smp", str(plan.cpus)]
        if plan.huge:
            size = f"size={plan.memory >> 10}K"
            words += ["-object", f"memory-backend-memfd,id=memory,{size},hugetlb=on"]
            words += ["-machine", "memory-backend=memory"]
        if wires.memory is not None:
            place = f"mem-path=/proc/self/fd/{wires.memory},share=on"
            words += ["-object", f"memory-backend-file,id=memory,size={plan.memory >> 10}K,{place}"]
            words += ["-machine", "memory-backend=memory"]
        if wires.devices is not None:
            words += ["-incoming", "defer"]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += _SANDBOX
        words += ["-kernel", f"{view}/kernel", "-append", " ".join(self._append(plan))]
        words += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        if wires.monitor is not None:
            words += ["-chardev", f"socket,id=monitor,fd={wires.monitor}"]
            words += ["-mon", "chardev=monitor,mode=control"]
        words += ["-device", "virtio-serial-device,max_ports=2"]
        words += ["-chardev", f"socket,id=channel,fd={wires.channel}"]
        words += ["-device", f"virtserialport,chardev=channel,name={CHANNEL_NAME},nr=1"]
        for number, disk in enumerate(plan.disks):
            words += _disk(number, disk, view)
        for name, writable in shares(plan):
            words += _share(name, f"{view}/{name}", writable)
        if wires.network is not None:
            words += ["-netdev", f"dgram,id=net,local.type=fd,local.str={wires.network}"]
            words += ["-device", "virtio-net-device,netdev=net"]
        return words

    def _machine(self) -> str:
        return f"microvm,accel={self.accelerator},pit=on,pic=on,rtc=on"

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

    name = "kvm"
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


def _disk(number: int, disk: Disk, view: str) -> list[str]:
    # No lock on the file: many guests share an image, and some file systems have none.
    back = f"driver=raw,node-name=disk{number},read-only={'off' if disk.writable else 'on'}"
    back += f",file.driver=file,file.filename={view}/{disk.view_name},file.locking=off"
    return ["-blockdev", back, "-device", f"virtio-blk-device,drive=disk{number}"]


def _share(tag: str, path: str, writable: bool) -> list[str]:
    back = f"local,id={tag},path={path},security_model=none,multidevs=remap"
    back += "" if writable else ",readonly=on"
    return ["-fsdev", back, "-device", f"virtio-9p-device,fsdev={tag},mount_tag={tag}"]
