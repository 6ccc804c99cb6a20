"""An image that carries the agent, booted by QEMU on Debian's kernel: no launcher, no pot.

The initrd is the smallest that any distribution's does: modules, root, start of the agent.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from apppot.guest.protocol import drive
from apppot.guest.protocol.job import Job
from apppot.host.common import paths
from apppot.host.common.errors import ApppotError
from apppot.host.images.exporting.export import Wishes, export
from apppot.host.pot.apt import Apt

from tests.harness.serial import BOOT_SECONDS, until_off
from tests.harness.vm import embedded_image, eventually
from tests.lab.initramfs import cpio

QEMU = "qemu-system-x86_64"
MODULES = ("virtio_pci", "virtio_blk", "squashfs", "overlay")
INIT = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int failed(const char *what) { perror(what); sleep(1); return 1; }

int main(void)
{
    struct dirent **module;
    int count, i, fd;

    if (chdir("/modules") || (count = scandir(".", &module, NULL, alphasort)) < 0)
        return failed("/modules");
    for (i = 0; i < count; i++) {
        if (module[i]->d_name[0] == '.')
            continue;
        fd = open(module[i]->d_name, O_RDONLY);
        if (syscall(SYS_finit_module, fd, "", 0))
            return failed(module[i]->d_name);
        close(fd);
    }
    mkdir("/dev", 0755);
    if (mount("devtmpfs", "/dev", "devtmpfs", 0, NULL))
        return failed("/dev");
    if (mount("/dev/vda", "/new", "squashfs", MS_RDONLY, NULL))
        return failed("/dev/vda");
    if (chdir("/new") || mount(".", "/", NULL, MS_MOVE, NULL) || chroot("."))
        return failed("/new");
    execl("/sbin/apppot-init", "/sbin/apppot-init", NULL);
    return failed("/sbin/apppot-init");
}
"""


@dataclass(frozen=True)
class Kernel:
    """Debian's kernel for virtual machines, unpacked, and an initrd with its modules."""

    release: str
    image: Path
    initrd: Path


def modules(tree: Path, names: tuple[str, ...]) -> list[bytes]:
    """The modules and what they need, as they can be loaded one after the other.

    A package that is not installed has no modules.dep: a module says itself what it needs.
    """
    files = {path.name.split(".")[0].replace("-", "_"): path for path in tree.rglob("*.ko*")}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name not in files:  # or it is built in
            return
        data = files[name].read_bytes()
        if files[name].suffix == ".xz":
            data = lzma.decompress(data)
        needs = re.search(rb"\0depends=([^\0]*)\0", data)
        for need in needs[1].decode().split(",") if needs else []:
            load(need.replace("-", "_"))
        loaded[name] = data

    for name in names:
        load(name)
    return list(loaded.values())


def make_initrd(folder: Path, tree: Path) -> Path:
    program = folder / "init"
    command = ["gcc", "-static", "-Os", "-x", "c", "-o", str(program), "-"]
    subprocess.run(command, input=INIT.encode(), check=True, timeout=60)
    entries = [(name, 0o40755, b"") for name in ("modules", "new")]
    entries.append(("init", 0o100755, program.read_bytes()))
    for number, data in enumerate(modules(tree, MODULES)):
        entries.append((f"modules/{number:02}.ko", 0o100644, data))
    target = folder / "initrd"
    target.write_bytes(cpio(entries))
    return target


def fetch_kernel(cache: Path) -> Path:
    """The newest package of Debian 12's kernel for virtual machines, out of the cache if there."""
    found = sorted((cache / "debs").glob("linux-image-*.deb"))
    if found:
        return found[-1]
    apt = Apt(cache, ["bookworm"])
    apt.update()
    pattern = re.compile(r"linux-image-6\.1\.0-(\d+)-cloud-amd64")
    numbers = [match[1] for match in map(pattern.fullmatch, apt.names("linux-image-6.1")) if match]
    (package,) = apt.packages([f"linux-image-6.1.0-{max(numbers, key=int)}-cloud-amd64"])
    return apt.download(package)


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    if shutil.which(QEMU) is None:
        pytest.skip("apt-get install qemu-system-x86")
    cache = Path(paths.cache_home()) / "tests"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with open(cache / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            package = fetch_kernel(cache)
    except ApppotError as error:
        pytest.skip(f"Debian's kernel cannot be downloaded: {error}")
    folder = tmp_path_factory.mktemp("debian-kernel")
    subprocess.run(["dpkg-deb", "-x", package, folder / "tree"], check=True, timeout=60)
    (image,) = (folder / "tree" / "boot").glob("vmlinuz-*")
    return Kernel(image.name.removeprefix("vmlinuz-"), image, make_initrd(folder, folder / "tree"))


@pytest.fixture(scope="session")
def squashfs() -> str:
    return embedded_image()


@pytest.fixture
def raw(squashfs: str, tmp_path: Path) -> Path:
    """The embedded image as a disk that can be written to."""
    image = tmp_path / "root.raw"
    export(squashfs, "raw", str(image), Wishes(boot=False))
    return image


class Machine:
    """A PC that QEMU emulates, with its serial line on QEMU's standard streams."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def argv(self, disks: list[str], words: str, *, initrd: bool = True) -> list[str]:
        argv = [QEMU, "-M", "q35,accel=tcg", "-cpu", "max", "-m", "512", "-nographic"]
        argv += ["-nic", "none", "-no-reboot", "-kernel", str(self.kernel.image)]
        if initrd:
            argv += ["-initrd", str(self.kernel.initrd)]
        for disk in disks:
            argv += ["-drive", disk]
        return [*argv, "-append", f"console=ttyS0 quiet panic=-1 {words}"]


@pytest.fixture
def machine(debian: Kernel) -> Machine:
    return Machine(debian)


def virtio(image: str | Path) -> str:
    # Nobody writes to it, and guests of other tests hold locks of their own on a stored image.
    return f"file={image},file.locking=off,if=virtio,format=raw,readonly=on"


def test_a_command_line(machine: Machine, squashfs: str) -> None:
    script = "uname -r; tr '\\\\0' ' ' </proc/1/cmdline; echo; id -u; pwd; tty; exit 7"
    words = f'apppot.uid=4321 apppot.gid=4322 -- sh -c "{script}"'
    text = until_off(machine.argv([virtio(squashfs)], words))
    assert f"\n{machine.kernel.release}\n" in text, text
    assert re.search(r"\n/usr/bin/python3\S* -IS /sbin/apppot-init ?\n", text), text
    assert "\n4321\n/home/user\n/dev/ttyS0\n" in text, text
    assert "the job ended with status 7" in text, text


def test_a_config_drive(machine: Machine, squashfs: str, tmp_path: Path) -> None:
    blank, config = tmp_path / "blank", tmp_path / "drive"
    blank.write_bytes(bytes(1 << 20))
    everything = bytes(range(1, 256))
    arguments = [b"a  b", b"'\"", b"", everything, b"\xff\n\t\x80"]
    script = b"""printf '%s\\0' "$@" "$A" | sha256sum; id -un; exit 3"""
    job = Job(argv=[b"sh", b"-c", script, b"sh", *arguments], env={b"A": everything[::-1]})
    config.write_bytes(drive.pack(job.dump()))
    text = until_off(machine.argv([virtio(image) for image in (squashfs, blank, config)], ""))
    wanted = b"".join([word + b"\0" for word in (*arguments, everything[::-1])])
    assert f"{hashlib.sha256(wanted).hexdigest()}  -\nuser\n" in text, text
    assert "the job ended with status 3" in text, text


def test_a_disk_that_is_written_to_needs_no_initrd(machine: Machine, raw: Path) -> None:
    disk = f"file={raw},if=none,id=root,format=raw"
    words = "root=/dev/nvme0n1 rw init=/sbin/apppot-init"
    script = "uname -r; echo mine >/home/user/mine; sudo useradd bob; exec 5>/home/user/open"
    argv = machine.argv([disk], f'{words} -- sh -c "{script}"', initrd=False)
    text = until_off([*argv, "-device", "nvme,drive=root,serial=1"])
    assert f"\n{machine.kernel.release}\n" in text, text
    assert "the job ended with status 0" in text, text
    checked = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    command = ["debugfs", "-R", "cat /home/user/mine", str(raw)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"mine\n"
    command = ["debugfs", "-R", "cat /etc/passwd", str(raw)]
    assert b"\nbob:x:" in subprocess.run(command, capture_output=True, check=True).stdout


@dataclass(frozen=True)
class Line:
    """The two ends of a machine's serial line."""

    send: Callable[[bytes], int]
    expect: Callable[[bytes], None]
    ended: Callable[[], int]


@pytest.fixture
def line(machine: Machine, squashfs: str) -> Iterator[Line]:
    argv = machine.argv([virtio(squashfs)], "")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        into, out = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(out, False)
        seen = bytearray()

        def expect(text: bytes) -> None:
            assert eventually(lambda: shown(text), BOOT_SECONDS), bytes(seen)
            del seen[: seen.index(text) + len(text)]

        def shown(text: bytes) -> bool:
            try:
                data = os.read(out, 65536)
            except BlockingIOError:
                return False
            assert data, bytes(seen)  # or the machine is off
            seen.extend(data)
            return text in seen

        try:
            yield Line(
                lambda data: os.write(into, data), expect, lambda: process.wait(BOOT_SECONDS)
            )
        finally:
            process.kill()


def test_a_shell_with_job_control_on_the_serial_line(line: Line) -> None:
    # The command itself says that it has the terminal now.
    announced = b"sh -c 'tty; echo at $((40+2)); exec sleep 1000'\n"
    line.expect(b"$ ")
    line.send(announced)
    line.expect(b"/dev/ttyS0\r\nat 42")
    line.send(b"\x1a")
    line.expect(b"Stopped")
    line.send(b"echo job $(jobs | wc -l)\n")
    line.expect(b"job 1")
    line.send(announced)
    line.expect(b"at 42")
    line.send(b"\x03")
    # The prompt: whether the key itself is echoed is the line editor's own business.
    line.expect(b"$ ")
    line.send(b'echo interrupted $?; exec sh -c "exit 6"\n')
    line.expect(b"interrupted 130")
    line.expect(b"the job ended with status 6")
    assert line.ended() == 0
