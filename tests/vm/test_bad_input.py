"""What cannot be run is told: exit 125, the cause and what helps, and nothing is lost."""

from __future__ import annotations

import os
import stat
import tarfile
from pathlib import Path

import pytest
from apppot.host.images.resolve import resolve

from tests.harness.vm import IMAGE, RELEASE, Launcher


def _image_file() -> Path:
    image = resolve(IMAGE)
    return Path(image.path)


def test_missing_image(apppot: Launcher) -> None:
    text = apppot("no-such-image", "true").failed("no-such-image", "remedy:")
    assert "apppot image" in text


def test_missing_image_file(apppot: Launcher) -> None:
    apppot("./no-such.squashfs", "true").failed("no-such.squashfs")


def test_empty_image(apppot: Launcher) -> None:
    (apppot.work / "empty.squashfs").touch()
    apppot("./empty.squashfs", "true").failed("empty")


def test_unknown_image(apppot: Launcher) -> None:
    (apppot.work / "text.img").write_bytes(b"this is no file system\n" * 1000)
    apppot("./text.img", "true").failed("text.img")


@pytest.mark.parametrize("part", [0.001, 0.5, 0.999])
def test_truncated_image(apppot: Launcher, part: float) -> None:
    whole = _image_file().read_bytes()
    (apppot.work / "short.squashfs").write_bytes(whole[: int(len(whole) * part)])
    apppot("./short.squashfs", "true").failed("truncated")


def test_tar_that_was_not_imported(apppot: Launcher) -> None:
    with tarfile.open(apppot.work / "root.tar", "w") as archive:
        archive.add("/etc/hostname")
    apppot("./root.tar", "true").failed("root.tar", "apppot image import")


@pytest.mark.parametrize("kernel", ["/etc/passwd", "/no/such/kernel", "/etc", "script"])
def test_wrong_kernel(apppot: Launcher, kernel: str) -> None:
    (apppot.work / "script").write_text("not a kernel\n")
    (apppot.work / "script").chmod(0o755)
    apppot("--kernel", kernel, IMAGE, "true").failed(os.path.basename(kernel), "remedy:")
    assert apppot.left() == []


def test_kernel_that_is_another_program(apppot: Launcher) -> None:
    """Starts and ends without a word on the channel."""
    result = apppot("--kernel", "/bin/true", IMAGE, "true")
    assert result.status == 125
    assert result.out == b""
    assert b"Traceback" not in result.err
    assert apppot.left() == []


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--mem", "1M"], "too little"),
        (["--mem", "900G"], "cannot be had"),
        (["--mem", "lots"], "not a size"),
        (["--mem", "-5M"], "--mem"),
        (["--cpus", "0"], "--cpus"),
        (["--cpus", "many"], "--cpus"),
        (["--time", "soon"], "not a duration"),
        (["--scratch", "0"], "--scratch"),
        (["--gpus", "all"], "GPU"),
        (["--nv"], "GPU"),
        (["--network", "bridge"], "--network"),
        (["--user", "nobody-here"], "nobody-here"),
        (["--job-dir", "/no/such"], "/no/such"),
        (["--bind", "/no/such:/data"], "/no/such"),
        (["--bind", "/etc:relative"], "relative"),
        (["--env-file", "/no/such"], "/no/such"),
        (["--env", "=x"], "--env"),
        (["-p", "0:80"], "--publish"),
        (["--hypervisor", "vmware"], "--hypervisor"),
        (["--log", "/no/such/log"], "/no/such/log"),
        (["--changes", "/no/such.squashfs"], "/no/such.squashfs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option(apppot: Launcher, words: list[str], cause: str) -> None:
    apppot(*words, IMAGE, "true").failed(cause)
    assert apppot.left() == []


def test_unknown_option(apppot: Launcher) -> None:
    apppot("--tiem", "5", IMAGE, "true").failed("--tiem", "did you mean --time?")


def test_no_arguments(apppot: Launcher) -> None:
    apppot().failed("IMAGE")


def test_unreadable_job_directory(user: Launcher) -> None:
    closed = user.work / "closed"
    closed.mkdir(mode=0o000)
    user("--job-dir", str(closed), IMAGE, "true").failed("closed", "remedy:")


def test_job_directory_that_is_gone(apppot: Launcher) -> None:
    gone = apppot.work / "gone"
    gone.mkdir()

    def vanish() -> None:
        gone.rmdir()

    result = apppot(IMAGE, "true", cwd=gone, before_exec=vanish)
    assert result.status == 125
    assert b"Traceback" not in result.err


def test_unreadable_image(user: Launcher, place: Path) -> None:
    image = place / "closed.squashfs"
    image.write_bytes(_image_file().read_bytes()[: 1 << 20])
    image.chmod(0o000)
    user(str(image), "true").failed("closed.squashfs")


def test_read_only_image(apppot: Launcher, place: Path) -> None:
    """A file that nobody may write, from a directory that nobody may write."""
    closed = place / "closed"
    closed.mkdir()
    image = closed / "image.squashfs"
    image.write_bytes(_image_file().read_bytes())
    image.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)
    closed.chmod(0o555)
    before = image.stat()
    out = apppot(str(image), "sh", "-c", "uname -r; echo x > /etc/new; rm /etc/fstab; ls /etc/new")
    assert out.ok().decode().startswith(RELEASE)
    assert image.stat().st_mtime_ns == before.st_mtime_ns
