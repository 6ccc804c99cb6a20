"""Disks that boot by themselves, on the devices that VirtualBox has: AHCI, e1000, BIOS and UEFI.

What the guest's side makes of a job's sources is tested on the same disks under User-Mode Linux,
where a boot takes a second.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from apppot.guest.protocol import drive
from apppot.host.images.exporting.export import Wishes, export
from apppot.host.pot.layout import find_pot

from tests.harness.cloud import certificate, serving
from tests.harness.screen import Screen
from tests.harness.serial import BOOT_SECONDS, until_off
from tests.harness.vm import IMAGE, RELEASE, ROOT, eventually

QEMU = "qemu-system-x86_64"
OVMF = "/usr/share/OVMF/OVMF_CODE.fd"
ALSO = 60
OUTPUT_BYTES = 4 << 20
# The third and fourth partition of the disk are its description and the runtime.
RUNTIME = "ubda4"
CHANGED = "from the changes"
DATA = random.Random(7).randbytes(200_000)


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base image with changes over it, as a disk that boots."""
    for tool in (QEMU, "grub-mkimage", "mcopy", "mkfs.fat", "sfdisk"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: see image-recipes/host/packages.txt")
    folder = tmp_path_factory.mktemp("exported")
    tree = folder / "tree"
    (tree / "etc").mkdir(parents=True)
    (tree / "etc" / "changed").write_text(CHANGED)
    changes = folder / "changes.sqfs"
    tool_run("mksquashfs", tree, changes, "-quiet", "-all-root", "-no-progress")
    target = folder / "disk.raw"
    export(IMAGE, "raw", str(target), Wishes(changes=(str(changes),)))
    return target


def tool_run(*argv: str | os.PathLike[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=ALSO, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def watched(argv: list[str], place: Path) -> Iterator[Screen]:
    """The screen of a machine that stays when it has powered itself off."""
    screen = Screen(place)
    argv = [*argv, *screen.words, "-no-shutdown"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=[screen.fd]) as process:
        try:
            screen.connect()
            yield screen
        finally:
            process.kill()
            screen.close()


# Controller and disk; the disk's words end with where it is.
Place = tuple[str, ...]
AHCI: Place = ("ide-hd,bus=ahci.0",)


def pc(disk: Path, others: list[str], *words: str, boot: Place = AHCI) -> list[str]:
    """A PC with disks at an AHCI controller, and nothing that was not asked for."""
    argv = [QEMU, "-M", "pc,accel=tcg,usb=off", "-cpu", "max", "-m", "512", "-nodefaults"]
    argv += ["-display", "none", "-no-reboot", "-device", "ahci,id=ahci"]
    # The disk stays as it is: what is written goes to a file that QEMU forgets.
    argv += ["-drive", f"file={disk},format=raw,snapshot=on,file.locking=off,if=none,id=d0"]
    for device in (*boot[:-1], f"{boot[-1]},drive=d0,bootindex=0"):
        argv += ["-device", device]
    for number, words_of_drive in enumerate(others, 1):
        kind = "ide-cd" if "media=cdrom" in words_of_drive else "ide-hd"
        argv += ["-drive", f"{words_of_drive},if=none,id=d{number}"]
        argv += ["-device", f"{kind},drive=d{number},bus=ahci.{number}"]
    return [*argv, *words]


SERIAL = ("-serial", "stdio")
UEFI = ("-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}")


def uml(disk: Path, *others: Path) -> list[str]:
    """The same disks under the pot's own kernel for User-Mode Linux."""
    argv = [find_pot().kernel.path, "mem=256M", "seccomp=on", f"ubd0r={disk}"]
    argv += [f"ubd{number}={path}" for number, path in enumerate(others, 1)]
    argv += [f"root=/dev/{RUNTIME}", "ro", "rootfstype=ext4", "init=/sbin/apppot-init"]
    return [*argv, "apppot.disk", "con=null", "con0=null,fd:1", "quiet"]


def job_drive(path: Path, **words: object) -> Path:
    path.write_bytes(drive.pack(json.dumps({"apppot": 1, **words}).encode()))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A disk that offers itself for outputs."""
    path = tmp_path / "out"
    with open(path, "wb") as file:
        file.write(b"APPPOT-OUT")
        file.truncate(OUTPUT_BYTES)
    return path


class Returned:
    """A tar that came back: its status, and its members."""

    def __init__(self, data: bytes) -> None:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            self.members = {
                member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
                for member in archive
                if member.isfile()
            }
        self.status: dict[str, Any] = json.loads(self.members["apppot/status.json"])
        assert next(iter(self.members)) == "apppot/status.json"
        assert self.status["kernel"].startswith(RELEASE)

    def said(self) -> str:
        return self.members["apppot/stdout"].decode()


def iso(path: Path, label: str, files: dict[str, bytes]) -> Path:
    tree = path.with_suffix(".tree")
    for name, data in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data)
    tool_run("xorriso", "-as", "genisoimage", "-quiet", "-V", label, "-J", "-r", "-o", path, tree)
    return path


def fat(path: Path, label: str, files: dict[str, bytes]) -> Path:
    with open(path, "wb") as file:
        file.truncate(4 << 20)
    tool_run("mkfs.fat", "-n", label, path)
    for name, data in files.items():
        for folder in [*Path(name).parents][-2::-1]:
            subprocess.run(["mmd", "-i", path, f"::{folder}"], capture_output=True, check=False)
        source = path.with_suffix(".file")
        source.write_bytes(data)
        tool_run("mcopy", "-i", path, source, f"::{name}")
    return path


# --- on a PC -------------------------------------------------------------------------------------

# What the job sees of its machine.  The driver of each network device: e1000.
LOOK = """set -e
cat /etc/changed; echo
id -un; pwd; hostname
[ -d /sys/firmware/efi ] && echo UEFI || echo BIOS
for device in /sys/class/net/*/device/driver; do basename "$(readlink "$device")"; done
lsblk -dno TRAN,NAME 2>/dev/null || true
"""


def test_bios_with_a_config_drive_and_an_output_disk(disk: Path, out: Path, tmp_path: Path) -> None:
    script = LOOK + 'echo lost >&2; mkdir a; printf %s "$DATA" | base64 -d >a/data; exit 7'
    patterns = ["**/data", "b", "/etc/hostnam[e]", "/none/*"]
    words = {"env": {"DATA": base64.b64encode(DATA[:60_000]).decode()}, "outputs": patterns}
    config = job_drive(tmp_path / "config", command=script, hostname="node7", **words)
    drives = [f"file={path},format=raw" for path in (config, out)]
    text = until_off(pc(disk, drives, *SERIAL, "-nic", "user,model=e1000,restrict=on"))
    assert "the job ended with status 7" in text, text
    found = Returned(out.read_bytes())
    said = found.said().splitlines()
    assert said[:6] == [CHANGED, "user", "/home/user/job", "node7", "BIOS", "e1000"], said
    assert found.members["apppot/stderr"] == b"lost\n"
    assert found.members["job/a/data"] == DATA[:60_000]
    assert found.members["job/hostname"] == b"node7\n"
    assert found.status["outputs"] == ["a/data", "hostname"]
    assert (found.status["status"], found.status["missing"]) == (7, ["b", "/none/*"])
    assert found.status["user_seconds"] > 0


# One of each kind that clouds and desktops have, beside those of the other tests.
CONTROLLERS = ("virtio-scsi-pci", "pvscsi", "lsi53c895a", "mptsas1068")
CARDS = ("virtio-net-pci", "vmxnet3", "pcnet")
DRIVERS = {
    *("virtio_scsi", "vmw_pvscsi", "sym53c8xx", "mptsas", "ahci"),
    *("e1000e", "virtio_net", "vmxnet3", "pcnet32", "QEMU QEMU USB Keyboard"),
}
LOOK_CLOSER = """cat /sys/class/scsi_host/*/proc_name
sed -n 's/.*Name="\\(.*USB.*\\)"/\\1/p' /proc/bus/input/devices
uname -srvm
"""


def test_uefi_with_openstacks_drive_and_only_a_screen(
    disk: Path, out: Path, tmp_path: Path
) -> None:
    user_data = base64.encodebytes(gzip.compress(f"#!/bin/bash\n{LOOK}{LOOK_CLOSER}".encode()))
    about = json.dumps({"uuid": "u-1", "hostname": "nova.site"}).encode()
    folder = "openstack/latest"
    files = {f"{folder}/user_data": user_data, f"{folder}/meta_data.json": about}
    config = fat(tmp_path / "config", "config-2", files)
    drives = [f"file={path},format=raw" for path in (config, out)]
    argv = pc(disk, drives, *UEFI, boot=("nvme,serial=1",))
    argv += ["-nic", "user,model=e1000e,restrict=on", "-device", "qemu-xhci", "-device", "usb-kbd"]
    for device in (*CONTROLLERS, *(f"{card},romfile=" for card in CARDS)):
        argv += ["-device", device]
    with watched(argv, tmp_path) as screen:
        assert eventually(lambda: not screen.running(), BOOT_SECONDS)
        found = Returned(out.read_bytes())
        said = found.said().splitlines()
        for line in (said[-1], "the job ended with status 0"):
            assert screen.shows(line)
        assert not screen.shows(said[-1][::-1])
    assert set(said) >= DRIVERS, said
    assert said[:5] == [CHANGED, "user", "/home/user/job", "nova", "UEFI"], said
    assert (found.status["source"], found.status["instance"]) == ("config-2", "u-1")
    assert found.status["status"] == 0


def test_a_metadata_service_and_a_store(disk: Path, tmp_path: Path) -> None:
    store = "https://169.254.169.100:8443/run?key=secret"
    proof = tmp_path / "store.pem"
    job = {
        "apppot": 1,
        "command": f"{LOOK} head -c 100000 /etc/ssl/certs/ca-certificates.crt >certs",
        "outputs": ["certs"],
        "report": {
            "status": store.replace("run", "status"),
            "outputs": store.replace("run", "outputs"),
            "headers": {"X-Run": "42"},
            "ca": certificate(proof, "169.254.169.100"),
        },
    }
    metadata = {
        "user-data": json.dumps(job).encode(),
        "meta-data/instance-id": b"i-0abc",
        "meta-data/local-hostname": b"ip-10.site.internal",
    }
    with serving(metadata) as service, serving({}, certificate=proof) as served:
        relay = f"cmd:{sys.executable} {ROOT}/tests/harness/cloud.py"
        network = "user,model=e1000,restrict=on,net=169.254.169.0/24"
        for address, port in (("254:80", service.port), ("100:8443", served.port)):
            network += f",guestfwd=tcp:169.254.169.{address}-{relay} {port}"
        text = until_off(pc(disk, [], *SERIAL, "-nic", network))
    assert "the job ended with status 0" in text, text
    status, headers = served.stored["/status?key=secret"]
    outputs, _ = served.stored["/outputs?key=secret"]
    found = Returned(gzip.decompress(outputs))
    assert found.said().splitlines()[3:6] == ["ip-10", "BIOS", "e1000"], text
    assert found.status == json.loads(status)
    assert (found.status["source"], found.status["instance"]) == ("ec2", "i-0abc")
    assert len(found.members["job/certs"]) == 100_000
    assert (headers["X-Run"], headers["Content-Type"]) == ("42", "application/json")
    assert "secret" not in text
    # Each was refused once; the status came last.
    assert served.log == [
        *["PUT /outputs?key=secret"] * 2,
        *["PUT /status?key=secret"] * 2,
    ]


@pytest.fixture
def console(
    disk: Path, tmp_path: Path
) -> Iterator[tuple[Callable[[bytes], int], Callable[[bytes], None], Screen, Any]]:
    """A PC without a job: (type at its serial line, wait for what that shows, screen, process)."""
    screen = Screen(tmp_path)
    with subprocess.Popen(
        pc(disk, [], *SERIAL, *screen.words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[screen.fd],
    ) as process:
        screen.connect()
        assert process.stdin is not None and process.stdout is not None
        into, shown = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(shown, False)
        seen = bytearray()

        def arrived(text: bytes) -> bool:
            with suppress(BlockingIOError):
                seen.extend(os.read(shown, 65536))
            return text in seen

        def expect(text: bytes) -> None:
            assert eventually(lambda: arrived(text), BOOT_SECONDS), bytes(seen)
            del seen[: seen.index(text) + len(text)]

        try:
            yield lambda data: os.write(into, data), expect, screen, process
        finally:
            process.kill()
            screen.close()


def test_without_a_job_there_are_shells_on_serial_line_and_screen(
    console: tuple[Any, Any, Screen, Any],
) -> None:
    send, expect, screen, process = console
    expect(b"$ ")
    send(b"echo $(id -un) $(tty) $TERM $(uname -r) $((40+2))\n")
    expect(b"user /dev/ttyS0 vt220 " + RELEASE.encode())
    expect(b"$ ")
    assert eventually(lambda: screen.text().endswith("$"), ALSO), screen.text()
    assert "job from the image" in screen.text()
    screen.type("uname -r; echo $(id -un) $(tty) $TERM > /dev/ttyS0\n")
    expect(b"user /dev/tty0 linux")
    assert re.search(rf"^{re.escape(RELEASE)}", screen.text(), re.MULTILINE), screen.text()
    screen.type("exit 6\n")
    expect(b"the job ended with status 6")
    assert process.wait(ALSO) == 0


def test_a_job_that_nobody_asks_for_is_on_the_screen_where_there_is_no_serial_line(
    disk: Path, tmp_path: Path
) -> None:
    script = "uname -r; tty; stty size; read line"
    config = job_drive(tmp_path / "config", command=script)
    with watched(pc(disk, [f"file={config},format=raw"]), tmp_path) as screen:
        assert eventually(lambda: screen.text().endswith("\n25 80"), BOOT_SECONDS), screen.text()
        screen.press("ctrl", "alt", "delete")
        # Not by a reset: disks and whoever waits for a status would not be told.
        assert eventually(lambda: not screen.running(), ALSO), screen.text()
        text = screen.text()
    assert re.search(rf"^{re.escape(RELEASE)}.*\n/dev/tty0\n25 80\n", text, re.MULTILINE), text
    assert "somebody has pressed Ctrl-Alt-Del" in text, text
    assert "the job ended with status 125" in text, text


BOOTS: dict[str, tuple[Place, str, tuple[str, ...]]] = {
    "virtio": (("virtio-blk-pci",), "virtio-net-pci", ()),
    "virtio-scsi": (("virtio-scsi-pci,id=boot", "scsi-hd,bus=boot.0"), "virtio-net-pci", ()),
    "virtio-uefi": (("virtio-scsi-pci,id=boot", "scsi-hd,bus=boot.0"), "virtio-net-pci", UEFI),
    "nvme": (("nvme,serial=1",), "e1000e", ()),
    "vmware": (("pvscsi,id=boot", "scsi-hd,bus=boot.0"), "vmxnet3", ()),
    "lsi": (("lsi53c895a,id=boot", "scsi-hd,bus=boot.0"), "pcnet", ()),
    "ide": (("ide-hd,bus=ide.0",), "e1000", ()),
}


@pytest.mark.skipif(
    "VM_TESTS_ALL_DEVICES" not in os.environ,
    reason="seven more emulated PCs: set VM_TESTS_ALL_DEVICES=1",
)
@pytest.mark.parametrize("name", BOOTS)
def test_it_boots_from(name: str, disk: Path, out: Path, tmp_path: Path) -> None:
    boot, card, words = BOOTS[name]
    config = job_drive(tmp_path / "config", command="uname -r; ip -4 -o address show scope global")
    drives = [f"file={path},format=raw" for path in (config, out)]
    network = ("-nic", f"user,model={card},restrict=on")
    text = until_off(pc(disk, drives, *SERIAL, *network, *words, boot=boot))
    assert "the job ended with status 0" in text, text
    assert Returned(out.read_bytes()).said().startswith(RELEASE)
    assert "no DHCP server answers" not in text


# --- the guest's side ----------------------------------------------------------------------------


def test_nocloud_comes_before_openstack_and_a_signal_is_told(
    disk: Path, out: Path, tmp_path: Path
) -> None:
    script = b"#!/bin/bash\nhostname; uname -r; kill -9 $$\n"
    about = b"instance-id: i-7\nlocal-hostname: cloud.site\n"
    first = iso(tmp_path / "a.iso", "cidata", {"user-data": script, "meta-data": about})
    other = {"openstack/latest/user_data": b"#!/bin/sh\nexit 1\n"}
    second = iso(tmp_path / "b.iso", "config-2", other)
    text = until_off(uml(disk, second, first, out))
    assert "the job ended with status 137" in text, text
    found = Returned(out.read_bytes())
    assert found.said().startswith(f"cloud\n{RELEASE}")
    assert (found.status["signal"], found.status["instance"]) == (9, "i-7")


def test_cloud_init_is_refused(disk: Path, tmp_path: Path) -> None:
    files = {"user-data": b"#cloud-config\nruncmd: [x]\n", "meta-data": b""}
    text = until_off(uml(disk, iso(tmp_path / "a.iso", "CIDATA", files)))
    assert "'#cloud-config' are no job: give a script (#!) or JSON" in text, text
    assert "the job ended with status 125" in text


def test_outputs_that_do_not_arrive_are_a_failure(disk: Path, out: Path, tmp_path: Path) -> None:
    config = job_drive(tmp_path / "config", command="head -c 9000000 /dev/zero; exit 0")
    text = until_off(uml(disk, config, out))
    assert "the job's status 0 is not reported: output disk /dev/ubdc: " in text, text[-2000:]
    assert "too small" in text
    assert "the job ended with status 125" in text
    with pytest.raises(tarfile.TarError):
        tarfile.open(out)


@pytest.mark.parametrize(("command", "status"), [("missing-program", 127), ("/etc/passwd", 126)])
def test_what_cannot_be_executed_is_told(
    disk: Path, out: Path, tmp_path: Path, command: str, status: int
) -> None:
    config = job_drive(tmp_path / "config", command=[command])
    until_off(uml(disk, config, out))
    found = Returned(out.read_bytes())
    assert (found.status["status"], command in found.status["error"]) == (status, True)


def test_a_job_that_was_not_started_is_told(disk: Path, out: Path, tmp_path: Path) -> None:
    config = job_drive(tmp_path / "config", command=["true"], workdir="/nowhere")
    text = until_off(uml(disk, config, out))
    assert "the job ended with status 125" in text, text
    found = Returned(out.read_bytes())
    assert (found.status["status"], "/nowhere" in found.status["error"]) == (125, True)


def test_what_jobs_write_goes_to_the_disks_scratch_space(out: Path, tmp_path: Path) -> None:
    disk, size = tmp_path / "disk.raw", 64 << 20
    apppot = Path(sys.executable).parent / "apppot"
    # A bare number is in bytes, as for `run`.
    words = ("--format", "raw", "--scratch", str(size), "-o", disk)
    tool_run(apppot, "image", "export", IMAGE, *words)
    command = "uname -r; df -B1 --output=size / | tail -1; touch /here"
    argv = uml(disk, job_drive(tmp_path / "config", command=command), out)
    until_off([word.replace("ubd0r=", "ubd0=") for word in argv])
    release, room = Returned(out.read_bytes()).said().split()
    assert release.startswith(RELEASE)
    assert size * 3 // 4 < int(room) < size


# --- the files -----------------------------------------------------------------------------------


def test_the_same_inputs_are_the_same_bytes_in_every_form(disk: Path, tmp_path: Path) -> None:
    wishes = Wishes(changes=(str(disk.parent / "changes.sqfs"),))
    for name in ("a.raw", "a.vdi", "b.vdi", "a.qcow2", "a.vmdk"):
        export(IMAGE, name[2:], str(tmp_path / name), wishes)
    for form in ("raw", "vdi", "qcow2", "vmdk"):
        argv = ["qemu-img", "compare", "-F", form, "-f", "raw", disk, tmp_path / f"a.{form}"]
        tool_run(*argv)
    for form in ("vdi", "qcow2"):
        tool_run("qemu-img", "check", "-f", form, tmp_path / f"a.{form}")
    assert (tmp_path / "a.raw").read_bytes() == disk.read_bytes()
    assert (tmp_path / "a.vdi").read_bytes() == (tmp_path / "b.vdi").read_bytes()


def test_an_ova_holds_the_disk(disk: Path, tmp_path: Path) -> None:
    ova = tmp_path / "disk.ova"
    export(IMAGE, "ova", str(ova), Wishes(changes=(str(disk.parent / "changes.sqfs"),)))
    with tarfile.open(ova) as archive:
        names = archive.getnames()
        for member in archive:
            contents = archive.extractfile(member)
            assert contents is not None
            (tmp_path / member.name).write_bytes(contents.read())
    assert names == [f"{IMAGE}.ovf", f"{IMAGE}.mf", f"{IMAGE}-disk1.vmdk"]
    sums = re.findall(r"SHA256\((.+)\)= ([0-9a-f]{64})\n", (tmp_path / names[1]).read_text())
    assert [name for name, _ in sums] == [names[0], names[2]]
    for name, digest in sums:
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    tool_run("qemu-img", "compare", "-f", "raw", "-F", "vmdk", disk, tmp_path / names[2])
