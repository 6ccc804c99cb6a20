"""The pot's x86-64 kernel in QEMU: no initramfs, its own drivers, the agent, power off.

The processor is emulated: the kernel is the subject, and KVM may be there and not work.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from apppot.guest.protocol import drive
from apppot.guest.protocol.job import Job, Layer
from apppot.host.images.resolve import resolve
from apppot.host.pot import layout

from tests.harness.serial import until_off
from tests.harness.vm import IMAGE, RELEASE

QEMU = "qemu-system-x86_64"
WORDS = "console=ttyS0 quiet panic=-1 ro rootfstype=ext4 init=/sbin/apppot-init"


@pytest.fixture(scope="module")
def kernel() -> layout.MachineKernel:
    if shutil.which(QEMU) is None:
        pytest.skip("apt-get install qemu-system-x86")
    return layout.find_x86_kernel()


def disk(name: str, path: str, device: str) -> list[str]:
    # A guest's writes are thrown away: an IDE disk cannot be read-only.  Nor is it locked: guests
    # of other tests have locks of their own on a stored image.
    options = f"id={name},if=none,format=raw,snapshot=on,file.locking=off"
    return ["-drive", f"file={path},{options}", "-device", f"{device},drive={name}"]


def job_drive(place: Path, script: str, image: str) -> str:
    """A config drive with a job for root; the base image is the device `image`."""
    path = place / "drive"
    layers = [Layer(source=image.encode())]
    argv = [b"sh", b"-c", script.encode()]
    job = Job(argv=argv, layers=layers, user="root", uid=0, gid=0)
    path.write_bytes(drive.pack(job.dump()))
    return str(path)


def boot(machine: str, kernel: str, devices: Sequence[str], words: str) -> str:
    """What the serial line showed of a machine that powers itself off."""
    argv = [QEMU, "-M", machine, "-cpu", "max", "-m", "384", "-nodefaults", "-no-user-config"]
    argv += ["-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", kernel, *devices]
    return until_off([*argv, "-append", f"{WORDS} {words}"])


def test_direct_boot_without_pci(kernel: layout.MachineKernel, tmp_path: Path) -> None:
    script = "uname -r; cat /sys/class/virtio-ports/*/name; exit 7"
    devices = [
        *disk("root", layout.find_pot().runtime, "virtio-blk-device"),
        *disk("job", job_drive(tmp_path, script, "/dev/vdc"), "virtio-blk-device"),
        *disk("base", resolve(IMAGE).path, "virtio-blk-device"),
        *("-device", "virtio-serial-device", "-chardev", "null,id=line"),
        *("-device", "virtserialport,chardev=line,name=org.apppot.0"),
    ]
    words = "root=/dev/vda apppot.drive=/dev/vdb pci=off no_timer_check tsc_early_khz=1000000"
    machine = "microvm,accel=tcg,pit=on,pic=on,rtc=on"
    text = boot(machine, kernel.vmlinux, devices, words)
    assert f"{kernel.release}\norg.apppot.0\n" in text, text
    assert kernel.release.startswith(RELEASE)
    assert "the job ended with status 7" in text, text


def test_a_pc_with_other_disks(kernel: layout.MachineKernel, tmp_path: Path) -> None:
    """What an exported disk meets: firmware, a compressed kernel, no virtio but for 9p."""
    (tmp_path / "word").write_text("from the host")
    script = """uname -r; mount -t 9p -o trans=virtio,ro share /mnt && cat /mnt/word; echo
        basename "$(readlink -f /sys/class/net/eth0/device/driver)"; exit 7"""
    devices = [
        # Of each kind one: several get their names in the order in which they answer.
        *disk("root", layout.find_pot().runtime, "nvme,serial=1"),
        *disk("base", resolve(IMAGE).path, "ide-cd,bus=ide.1"),
        *disk("job", job_drive(tmp_path, script, "/dev/sr0"), "ide-hd,bus=ide.0"),
        *("-device", "e1000,netdev=net", "-netdev", "user,id=net,restrict=on"),
        *("-virtfs", f"local,path={tmp_path},mount_tag=share,security_model=none,readonly=on"),
    ]
    text = boot("q35,accel=tcg", kernel.bzimage, devices, "root=/dev/nvme0n1 apppot.drive=/dev/sda")
    assert f"{kernel.release}\nfrom the host\ne1000\n" in text, text
    assert "the job ended with status 7" in text, text
