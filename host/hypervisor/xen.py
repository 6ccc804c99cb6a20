"""Xen: a guest beside this system, started by `xl`.

The words are those of a program of ours, the guard (`apppot.host.hypervisor.xenguard`), which makes
the domain from the configuration given here, carries its channel, and ends it.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import sys

from apppot.guest.protocol import frames
from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.common.errors import HypervisorError
from apppot.host.hypervisor.base import Descriptors, HypervisorName, Share, Surroundings, Verdict
from apppot.host.hypervisor.launchplan import LaunchPlan, shares

CAPABILITIES = "/proc/xen/capabilities"
DEVICES = ("/dev/xen/privcmd", "/dev/loop-control")
# Of the channels that a configuration names, xl 4.17 drops the first.
CHANNEL = "/dev/hvc1"
CHANNEL_NAME = "org.apppot.0"
TOOLS = ("xl", "xenstore-read", "xenstore-write", "xenstore-watch")
INSTALL_HINT = "apt-get install xen-utils qemu-system-xen"
# Where builds of Xen look for the QEMU that carries channels and directories.
QEMUS = (
    "/usr/libexec/xen-qemu-system-*",
    "/usr/libexec/xen/bin/qemu-system-*",
    "/usr/lib/xen*/bin/qemu-system-*",
    "/usr/local/lib/xen*/bin/qemu-system-*",
)
# Some distributions have it in their usual QEMU, others have one without it there.
USUAL_QEMU = "/usr/bin/qemu-system-i386"
_MACHINE = b"xenpv"
_SEARCH = f"{os.defpath}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/sbin"
_TEMPORARY = 1 << 20


class Xen:
    """A paravirtualised (`pv`) domain, or one with the processor's virtualisation (`pvh`)."""

    name = HypervisorName.XEN
    kernel = "x86_64"
    devices = tuple(f"/dev/xvd{letter}" for letter in "abcdefghijklmnop")
    share: Share | None = Share.XEN_NINEP
    # Its file server numbers files as their file systems do, and those of two may be the same.
    shows_root = False
    network_device: str | None = "eth0"
    network_by_descriptor = True
    host_memory = False
    monitored = False
    exchange = False
    window = frames.INPUT_CREDIT
    pinned = False
    confinable = False
    guarded = True

    def __init__(self, host: Capabilities) -> None:
        pass

    def verdict(self) -> Verdict:
        machine = platform.machine()
        if machine != "x86_64":
            return Verdict(False, f"the pot has a kernel for x86_64, this is {machine}")
        if not _is_dom0():
            return Verdict(False, "this system is not Xen's dom0")
        if missing := [tool for tool in TOOLS if _find(tool) is None]:
            return Verdict(False, f"no {', '.join(missing)}: Xen's tools are missing", INSTALL_HINT)
        if not any(glob.glob(pattern) for pattern in QEMUS) and not _knows_xen(USUAL_QEMU):
            reason = "Xen's QEMU is missing, which carries a guest's channel"
            return Verdict(False, reason, INSTALL_HINT)
        if refused := [path for path in DEVICES if not os.access(path, os.R_OK | os.W_OK)]:
            remedy = "xl is the administrator's: run as root"
            return Verdict(False, f"{', '.join(refused)} cannot be opened by you", remedy)
        return Verdict(True, "this is dom0, with xl; the first guest proves whether it works")

    def without_servers(self) -> Xen:
        return self

    def surroundings(self, plan: LaunchPlan) -> Surroundings:
        return Surroundings(_TEMPORARY, programs=True)

    def argv(
        self, plan: LaunchPlan, view: str, scratch_dir: str, inherited: Descriptors
    ) -> list[str]:
        guard = os.path.join(os.path.dirname(__file__), "xenguard.py")
        network = "-" if inherited.network is None else str(inherited.network)
        words = [sys.executable, "-IS", guard, str(inherited.channel), network, _find("xl") or "xl"]
        words += [scratch_dir, self.configuration(plan, view, scratch_dir)]
        for device, disk in zip(self.devices, plan.disks, strict=False):
            mode = "rw" if disk.writable else "ro"
            words += ["disk", mode, f"{view}/{disk.view_name}", os.path.basename(device)]
        files = {item.tag: item.name for item in plan.shown}
        for tag, writable in shares(plan.job, plan.shown):
            words += ["share", "rw" if writable else "ro", f"{view}/{files[tag]}", tag]
        return words

    def configuration(self, plan: LaunchPlan, view: str, place: str) -> str:
        """The domain's, as xl.cfg(5) has it.

        `place` is where the guard puts links to the disks' loop devices, the directories that
        are shared, and the channel's socket.  The domain is called as the run directory is.
        """
        append = ["console=hvc0", "quiet", "panic=-1", f"root={self.devices[0]}", "ro"]
        append += ["rootfstype=ext4", "init=/sbin/apppot-init", *plan.extra]
        append += [f"apppot.drive={self.devices[1]}", f"apppot.channel={CHANNEL}"]
        lines = [
            f"name = {_quoted(os.path.basename(os.path.dirname(place)))}",
            f"type = {_quoted(plan.xen_type)}",
            f"kernel = {_quoted(f'{view}/kernel')}",
            f"extra = {_quoted(' '.join(append))}",
            # xl counts in MiB: what is asked for, or the next whole one.
            f"memory = {-(-plan.memory >> 20)}",
            f"vcpus = {plan.cpus}",
            # The guard reads the rest of its console, then destroys it.
            *(f"on_{end} = {_quoted('preserve')}" for end in ("poweroff", "reboot", "crash")),
        ]
        disks = [
            f"format=raw,vdev={os.path.basename(device)},access={'rw' if disk.writable else 'ro'},"
            f"script={place}/attach,target={place}/{os.path.basename(device)}"
            for device, disk in zip(self.devices, plan.disks, strict=False)
        ]
        directories = [
            f"tag={tag},path={place}/{tag},security_model=none"
            for tag, _ in shares(plan.job, plan.shown)
        ]
        channels = [
            "connection=pty,name=dropped",
            f"connection=socket,name={CHANNEL_NAME},path={place}/channel",
        ]
        groups = {"disk": disks, "p9": directories, "channel": channels}
        if plan.network_helper is not None:
            groups["vif"] = [f"script={place}/attach"]
        for name, entries in groups.items():
            lines += [f"{name} = [", *(f"    {_quoted(entry)}," for entry in entries), "]"]
        return "\n".join(lines) + "\n"


def _is_dom0() -> bool:
    try:
        with open(CAPABILITIES, encoding="ascii") as text:
            return "control_d" in text.read()
    except OSError:
        return False


def _knows_xen(qemu: str) -> bool:
    """Whether a program of QEMU's has the machine for guests of Xen."""
    try:
        with open(qemu, "rb") as file:
            return _MACHINE in file.read()
    except OSError:
        return False


def _find(tool: str) -> str | None:
    """A tool of Xen's, which are an administrator's: not on everybody's PATH."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:{_SEARCH}")


def _quoted(text: str) -> str:
    if set('"\\\n') & set(text):
        raise HypervisorError(
            f"xl has no way to write {text!r}", "leave out quotes and backslashes"
        )
    return f'"{text}"'
