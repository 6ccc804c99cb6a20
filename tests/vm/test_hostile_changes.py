"""Changes and sessions that went bad: a clear error or a correct result, and nothing else."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from apppot.host.images.changes import record as changes

from tests.harness.layers import QUIET, apart, busybox_tree, tool
from tests.harness.vm import RELEASE, Launcher, Result, Who, myself

pytestmark = pytest.mark.timeout(300)
APPLETS = (
    "sh",
    "cat",
    "cp",
    "find",
    "head",
    "ls",
    "mknod",
    "mount",
    "rm",
    "stat",
    "umount",
    "uname",
)
READ = "find / -xdev -path /home/user/job -prune -o -type f -exec cat {} + >/dev/null; uname -r"


@pytest.fixture
def apppot(launcher_for: Callable[[Who], Launcher], place: Path) -> Launcher:
    """A user with a small base image."""
    launcher = launcher_for(apart(myself(), place / "data"))
    busybox_tree(launcher.work / "tree", APPLETS)
    (launcher.work / "tree" / "srv").mkdir()
    (launcher.work / "tree" / "etc").mkdir()
    (launcher.work / "tree" / "etc" / "base").write_text("base\n")
    words = ["mksquashfs", "tree", "small.squashfs", "-quiet", "-all-root"]
    subprocess.run(words, cwd=launcher.work, check=True)
    assert tool(launcher, "image", "import", "small.squashfs").status == 0
    return launcher


@pytest.fixture
def whole(apppot: Launcher) -> bytes:
    """A changes file with something of everything in it."""
    script = "uname -r; rm /etc/base; cp /bin/busybox /srv/b; head -c 99999 /dev/urandom >/srv/r;"
    script += "cd /srv; for n in 1 2 3 4 5 6 7 8 9; do echo $n >name$n; done; mknod dev b 7 9"
    done = apppot("--session", "s", *QUIET, "-u", "root", "small", "sh", "-c", script)
    assert done.ok().decode().startswith(RELEASE)
    assert tool(apppot, "changes", "save", "s", "-o", "it.changes").status == 0
    return (apppot.work / "it.changes").read_bytes()


def sane(result: Result) -> Result:
    """Whatever happened, it was said, and nobody fell over."""
    text = result.err.decode(errors="replace")
    assert "Traceback" not in text and "bug of AppPot" not in text, text
    assert "\x1b" not in text
    assert result.status == 0 or text, result
    return result


def test_damage_anywhere(apppot: Launcher, whole: bytes) -> None:
    """One guest mounts many damaged copies and reads them; some are given to `run` as well."""
    chance = random.Random(20)
    size = len(whole) - 400  # behind that is the record
    (apppot.work / "bad").mkdir()
    for number in range(60):
        data = bytearray(whole[:size])
        for _ in range(chance.choice((1, 3, 40))):
            # Where structures lie: at the start, and at the end.
            at = chance.choice((1024, size - 4000, 0)) + chance.randrange(4000)
            data[min(at, size - 1)] = chance.randrange(256)
        (apppot.work / "bad" / f"{number}").write_bytes(data)
    script = """
        for f in bad/*; do
            mount -t erofs -o loop,ro $f /srv 2>/dev/null || continue
            find /srv -exec stat {} + >/dev/null 2>&1; cat /srv/srv/* >/dev/null 2>&1; umount /srv
        done; uname -r"""
    done = apppot(*QUIET, "--time", "60s", "-u", "root", "small", "sh", "-c", script)
    assert done.ok().decode().startswith(RELEASE)
    for number in range(4):
        path = apppot.work / f"{number}.changes"
        path.write_bytes((apppot.work / "bad" / f"{number}").read_bytes() + whole[size:])
        sane(apppot("--changes", path.name, *QUIET, "--time", "30s", "small", "sh", "-c", READ))
        sane(tool(apppot, "changes", "verify", path.name))
    assert (apppot.work / "it.changes").read_bytes() == whole


def test_truncated_anywhere(apppot: Launcher, whole: bytes) -> None:
    for length in (0, 1, 1023, 1100, 5000, len(whole) // 2, len(whole) - 1):
        path = apppot.work / "short.changes"
        path.write_bytes(whole[:length])
        for words in (["inspect"], ["verify"], ["diff"]):
            assert sane(tool(apppot, "changes", *words, path.name)).status == 125
    sane(apppot("--changes", path.name, *QUIET, "small", "true"))


def evil(apppot: Launcher, name: str, **record: str) -> str:
    """A changes file made by hand of the directory `name`."""
    path = apppot.work / f"{name}.changes"
    words = ["mkfs.erofs", "--quiet", "-zlz4", str(path), str(apppot.work / name)]
    subprocess.run(words, check=True)
    shown = json.loads(tool(apppot, "image", "inspect", "small", "--json").ok())
    fields = {"base": shown["digest"], "image": "small", "created": "now", **record}
    changes.seal(str(path), changes.Changes(**fields))
    return path.name


def test_a_strangers_names_do_not_reach_the_terminal(apppot: Launcher) -> None:
    folder = apppot.work / "names" / "srv"
    folder.mkdir(parents=True)
    (folder / "esc\x1b]0;owned\x07\nD 0000 etc").write_text("x")
    (folder / os.fsdecode(b"\x9b31m\xff")).write_text("x")
    (folder / "link").symlink_to("../../../../\x1b[2J")
    made = evil(apppot, "names", image="\x1b]0;owned\x07")
    shown = tool(apppot, "changes", "diff", made).ok()
    assert len(shown.splitlines()) == 4
    assert all(0x20 <= byte < 0x7F for byte in shown.replace(b"\n", b""))
    assert b"\x1b" not in tool(apppot, "changes", "inspect", made).ok()
    assert b"\x1b" not in sane(apppot("--changes", made, *QUIET, "host", "true")).err


def test_links_and_devices_stay_in_the_guest(user: Launcher, apppot: Launcher) -> None:
    """An ordinary user's guest gets nothing of the host by what a stranger's changes hold."""
    secret = apppot.work / "secret"
    secret.write_text("the host's")
    secret.chmod(0o600)
    folder = apppot.work / "links"
    (folder / "srv").mkdir(parents=True)
    (folder / "srv" / "out").symlink_to(f"../../../../..{secret}")
    (folder / "srv" / "up").symlink_to("/proc/1/root/../../..")
    if os.getuid() == 0:
        host = os.stat(secret).st_dev
        os.mknod(folder / "srv" / "disk", 0o60666, host)
        os.mknod(folder / "srv" / "memory", 0o20666, os.makedev(1, 1))
    made = evil(apppot, "links")
    for name in (made, "small.squashfs"):
        (user.work / name).write_bytes((apppot.work / name).read_bytes())
    script = "uname -r; cat /srv/out; ls /srv/up; head -c 64 /srv/disk; head -c 64 /srv/memory"
    done = sane(user("--changes", made, *QUIET, "./small.squashfs", "sh", "-c", script))
    assert done.out.decode(errors="replace").startswith(RELEASE)
    assert b"the host's" not in done.out and b"secret" not in done.out
    assert b"can't open '/srv/out'" in done.err
    assert secret.read_text() == "the host's"


def test_what_cannot_be_so_large_is_not_read(apppot: Launcher) -> None:
    (apppot.work / "large" / "srv").mkdir(parents=True)
    with open(apppot.work / "large" / "srv" / "zeros", "wb") as file:
        file.truncate(64 << 20)
    made = apppot.work / evil(apppot, "large")
    assert tool(apppot, "changes", "verify", made.name).status == 0  # an honest one
    # The inode's size becomes 4 EiB: found by what it was.
    data, old = made.read_bytes(), struct.pack("<Q", 64 << 20)
    assert data.count(old) == 1 or data.count(old[:4]) >= 1
    data = data.replace(old, struct.pack("<Q", 1 << 62))
    made.write_bytes(data)
    sane(tool(apppot, "changes", "verify", made.name)).failed("zeros", "cannot be as large")


def test_a_full_disk_of_the_host(apppot: Launcher, tmp_path: Path) -> None:
    """The session's disk is sparse: where the host's is full, that is an error and no damage."""
    if os.getuid() != 0:
        pytest.skip("needs a mount")
    home = Path(apppot.who.env["XDG_DATA_HOME"]) / "apppot" / "sessions"
    home.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(home)], check=True)
    try:
        options = ("--session", "s", *QUIET, "-u", "root", "small", "sh", "-c")
        first = apppot(*options, "uname -r; echo kept >/srv/kept")
        assert first.ok().decode().startswith(RELEASE)
        fill = "head -c 99000000 /dev/zero >/srv/big; sync; cat /srv/big >/dev/null"
        full = sane(apppot(*options, fill))
        full.failed("could not keep what was written", "is the disk of the host full?")
        subprocess.run(["mount", "-o", "remount,size=200m", str(home)], check=True)
        assert apppot(*options, "rm -f /srv/big; cat /srv/kept").ok() == b"kept\n"
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True)


def test_a_full_session_is_no_space_for_the_command(apppot: Launcher) -> None:
    assert apppot("--session", "s", *QUIET, "small", "uname").ok() == b"Linux\n"
    disk = Path(apppot.who.env["XDG_DATA_HOME"]) / "apppot" / "sessions" / "s" / "disk.ext4"
    os.truncate(disk, 0)  # anew, at the least size
    os.truncate(disk, 64 << 20)
    script = "dd if=/dev/zero of=/srv/big bs=1M count=90; echo $?; rm /srv/big; echo on >/srv/on"
    options = ("--session", "s", *QUIET, "-u", "root", "small")
    done = apppot(*options, "sh", "-c", f"{script}; cat /srv/on")
    assert (done.status, done.out) == (0, b"1\non\n")
    assert b"No space left on device" in done.err
    assert tool(apppot, "session", "resize", "s", "1G").status == 0
    assert apppot(*options, "sh", "-c", f"{script}; cat /srv/on").out == b"0\non\n"
