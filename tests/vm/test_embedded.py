"""An image that carries the agent, booted by a bare kernel: no launcher, no pot."""

from __future__ import annotations

import base64
import os
import pty
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from apppot.guest.protocol import drive
from apppot.guest.protocol.job import Job
from apppot.host.pot import layout

from tests.harness.serial import until_off
from tests.harness.vm import RELEASE, embedded_image, eventually

INIT = ["root=/dev/ubda", "init=/sbin/apppot-init", "quiet"]
KEY = random.Random(5).randbytes(40)


@pytest.fixture(scope="session")
def squashfs() -> str:
    return embedded_image()


@pytest.fixture(scope="session")
def tree(squashfs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.getuid() != 0:
        pytest.skip("only root can unpack an image with its owners")
    target = tmp_path_factory.mktemp("embedded") / "tree"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", target, squashfs], check=True, timeout=60)
    return target


@pytest.fixture
def ext4(tree: Path, tmp_path: Path) -> Path:
    """The embedded image as a disk that can be written to."""
    image = tmp_path / "root.ext4"
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "700M"]
    subprocess.run(command, check=True, timeout=60)
    return image


class Machine:
    """Boots the pot's kernel with nothing of the launcher."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel = layout.find_pot().kernel

    def argv(self, *words: str, console: str = "fd:0,fd:1") -> list[str]:
        own = ["mem=256M", "con=null", f"con0={console}", f"uml_dir={self.folder}/"]
        return [self.kernel.path, *own, "seccomp=on", *words]

    def __call__(self, *words: str) -> str:
        return "\n" + until_off(self.argv(*words))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def read_only(image: str | Path) -> list[str]:
    return [f"ubd0r={image}", *INIT, "ro"]


def test_a_command_after_two_dashes(machine: Machine, squashfs: str) -> None:
    text = machine(*read_only(squashfs), "--", "uname", "-r", "-s")
    assert f"Linux {RELEASE}" in text
    assert "the job ended with status 0" in text


def test_the_originals_words_and_quotes(machine: Machine, squashfs: str, tmp_path: Path) -> None:
    job, temporary = tmp_path / "job", tmp_path / "temporary"
    job.mkdir()
    temporary.mkdir()
    (job / "in").write_bytes(KEY)
    words = ["apppot.uid=4321", "apppot.gid=4322", "apppot.user=user", "TERM=vt100"]
    words += [f"apppot.jobdir={job}", f"apppot.tmpdir={temporary}"]
    script = (
        'sha256sum in; id -u; id -g; pwd; echo "$#:$1:$TERM"; sudo sh -c "echo t >/tmp/t"; exit 9'
    )
    text = machine(*read_only(squashfs), *words, f"-- 'sh' '-c' '{script}' 'sh' 'a  b' 'c'")
    digest = subprocess.run(["sha256sum"], input=KEY, capture_output=True, check=True).stdout
    for line in (digest.split()[0].decode(), "\n4321\n4322\n/home/user/job\n2:a  b:vt100\n"):
        assert line in text, text
    assert "the job ended with status 9" in text
    assert (temporary / "t").read_bytes() == b"t\n"


def test_changes_are_a_file_of_the_host(machine: Machine, squashfs: str, tmp_path: Path) -> None:
    (tmp_path / "c" / "etc").mkdir(parents=True)
    (tmp_path / "c" / "etc" / "motd").write_bytes(KEY.hex().encode())
    image = tmp_path / "c.squashfs"
    subprocess.run(["mksquashfs", tmp_path / "c", image, "-quiet", "-no-progress"], check=True)
    words = [*read_only(squashfs), f"apppot.changes={image}", "--", "cat", "/etc/motd"]
    assert KEY.hex() in machine(*words)


def test_a_job_in_the_command_line(machine: Machine, squashfs: str) -> None:
    job = Job(argv=[b"printf", b"<%s>", b"a  b", b"'"], user="root")
    word = base64.urlsafe_b64encode(job.dump()).rstrip(b"=").decode()
    assert "<a  b><'>" in machine(*read_only(squashfs), f"apppot.job={word}")


def test_a_config_drive_is_found(machine: Machine, squashfs: str, tmp_path: Path) -> None:
    blank, config = tmp_path / "blank", tmp_path / "drive"
    blank.write_bytes(bytes(1 << 20))
    job = Job(argv=[b"sh", b"-c", b"echo $A; id -un; exit 3"], env={b"A": KEY.hex().encode()})
    config.write_bytes(drive.pack(job.dump()))
    words = [*read_only(squashfs), f"ubd1r={blank}", f"ubd2r={config}"]
    text = machine(*words)
    assert f"{KEY.hex()}\nuser\n" in text
    assert "the job ended with status 3" in text


def test_a_command_that_is_not_there(machine: Machine, squashfs: str) -> None:
    text = machine(*read_only(squashfs), "--", "no-such-command")
    assert "no-such-command: No such file or directory" in text
    assert "the job ended with status 127" in text


def test_a_root_that_is_read_only_is_left_alone(machine: Machine, ext4: Path) -> None:
    before = ext4.read_bytes()
    text = machine(*read_only(ext4), "--", "sudo", "sh", "-c", "'echo x >/etc/x; cat /etc/x'")
    assert "\nx\n" in text
    assert ext4.read_bytes() == before


def test_a_root_that_is_written_to_keeps_it_and_is_clean(machine: Machine, ext4: Path) -> None:
    boot = [f"ubd0={ext4}", *INIT, "rw", "apppot.uid=4321", "apppot.gid=4321"]
    script = "echo mine >~/mine; stat -c %u ~/mine; sudo useradd bob; sleep 99 & exec 5>~/open"
    text = machine(*boot, f"-- 'sh' '-c' '{script}'")
    assert "\n4321\n" in text, text
    checked = subprocess.run(["e2fsck", "-fn", ext4], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    state = subprocess.run(["dumpe2fs", "-h", ext4], capture_output=True, text=True, check=True)
    assert "needs_recovery" not in state.stdout
    # What belongs to the caller lies there as the image's `user`.
    stat = subprocess.run(
        ["debugfs", "-R", "stat /home/user/mine", ext4], capture_output=True, text=True, check=True
    )
    assert "User:  1000" in stat.stdout
    again = machine(*boot, "-- cat /home/user/mine /etc/passwd")
    assert "mine\n" in again and "bob:x:" in again
    assert again.count("user:x:4321:") == 1


def test_a_disk_that_is_not_there_is_said(machine: Machine, squashfs: str) -> None:
    text = machine(*read_only(squashfs), "apppot.drive=/dev/ubdc")
    assert "step 'job' failed" in text


@pytest.fixture
def console() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    for fd in (master, slave):
        os.close(fd)


def test_a_shell_with_job_control_on_the_console(
    machine: Machine, squashfs: str, console: tuple[int, int]
) -> None:
    master, slave = console
    seen = bytearray()
    argv = machine.argv(*read_only(squashfs))
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave) as process:
        os.set_blocking(master, False)

        def shown(text: bytes) -> bool:
            try:
                seen.extend(os.read(master, 65536))
            except BlockingIOError:
                pass
            return text in seen

        def expect(text: bytes) -> None:
            assert eventually(lambda: shown(text), 30), bytes(seen)

        try:
            # The command itself says that it has the terminal now.
            announced = b"sh -c 'tty; echo at $((40+2)); exec sleep 1000'\n"
            expect(b"$ ")
            os.write(master, announced)
            expect(b"/dev/tty0\r\nat 42")
            os.write(master, b"\x1a")
            expect(b"Stopped")
            os.write(master, b"echo job $(jobs | wc -l)\n")
            expect(b"job 1")
            seen.clear()
            os.write(master, announced)
            expect(b"at 42")
            os.write(master, b"\x03")
            # The prompt: whether the key itself is echoed is the line editor's own business.
            expect(b"$ ")
            os.write(master, b'echo interrupted $?; exec sh -c "exit 6"\n')
            expect(b"interrupted 130")
            expect(b"the job ended with status 6")
            assert process.wait(30) == 0
        finally:
            process.kill()
