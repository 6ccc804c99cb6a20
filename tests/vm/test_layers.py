"""Layers that are not a plain image: owners mapped to the caller's, and partitions of a disk."""

from __future__ import annotations

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, Launcher

STOCK = "/usr/bin/linux.uml"
CONTENT = random.Random(11).randbytes(50_000)
# (file, owner and group in the image)
OWNERS = (("users", 1000), ("roots", 0), ("others", 1234))
SECTOR = 512


@pytest.fixture
def tree(place: Path) -> Path:
    """Files of the images' `user`, of root and of another."""
    if os.getuid() != 0:
        pytest.skip("only root can make files of other owners")
    folder = place / "tree" / "srv"
    folder.mkdir(parents=True)
    for name, owner in OWNERS:
        (folder / name).write_bytes(CONTENT)
        (folder / name).chmod(0o600)
        os.chown(folder / name, owner, owner)
    return place / "tree"


def pack(tree: Path, kind: str) -> Path:
    image = tree.parent / f"image.{kind}"
    source, target = str(tree), str(image)
    command = {
        "squashfs": ["mksquashfs", source, target, "-quiet", "-no-progress"],
        "erofs": ["mkfs.erofs", target, source],
        "ext4": ["mke2fs", "-q", "-t", "ext4", "-d", source, target, "8M"],
    }[kind]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    image.chmod(0o644)
    return image


def owners(launcher: Launcher, *words: str) -> list[str]:
    script = "cd /srv; stat -c '%n %u %g %U' users roots others; cat users others 2>&1 | wc -c"
    done = launcher("--network", "none", *words, IMAGE, "sh", "-c", script)
    assert done.status == 0, done
    return done.out.decode().splitlines()


@pytest.mark.parametrize("kind", ["squashfs", "erofs", "ext4"])
def test_files_of_user_are_the_callers(user: Launcher, tree: Path, kind: str) -> None:
    uid, gid = user.who.uid, user.who.gid
    assert uid not in (0, 1000)
    users, roots, others, size = owners(user, "--changes", str(pack(tree, kind)))
    assert users == f"users {uid} {gid} user"
    assert roots == "roots 0 0 root"
    assert others.startswith("others 1234 1234 ")
    # Its own file can be read, the other one not.
    assert len(CONTENT) < int(size) < len(CONTENT) + 100


def test_root_sees_the_owners_as_they_are(apppot: Launcher, tree: Path) -> None:
    users, roots, others, size = owners(apppot, "--changes", str(pack(tree, "squashfs")))
    assert users == "users 1000 1000 user"
    assert roots == "roots 0 0 root"
    assert int(size) == 2 * len(CONTENT)


@pytest.mark.stock
@pytest.mark.skipif(not os.path.exists(STOCK), reason="no package user-mode-linux")
@pytest.mark.parametrize("kind", ["squashfs", "erofs", "ext4"])
def test_a_kernel_that_cannot_map_squashfs_runs_all_the_same(
    user: Launcher, tree: Path, kind: str
) -> None:
    uid = 1000 if kind == "squashfs" else user.who.uid
    users, *_ = owners(user, "--kernel", STOCK, "--changes", str(pack(tree, kind)))
    assert users.startswith(f"users {uid} {uid} ")


def test_what_the_user_writes_over_its_own_files_is_its(user: Launcher, tree: Path) -> None:
    image = pack(tree, "squashfs")
    script = "cd /srv; echo more >>users; stat -c %u users; sudo chown user roots; stat -c %u roots"
    done = user("--changes", str(image), IMAGE, "sh", "-c", script)
    assert done.ok().split() == [b"%d" % user.who.uid] * 2


# -- partitions --------------------------------------------------------------------------------


def disk_of(partition: Path, target: Path, first: int) -> Path:
    """A disk with an MBR: swap, then `partition` at sector `first`."""
    count = partition.stat().st_size // SECTOR
    head = bytearray(SECTOR)
    for number, (kind, start, length) in enumerate(((0x82, 64, 64), (0x83, first, count))):
        struct.pack_into("<B3sB3sII", head, 446 + 16 * number, 0, b"", kind, b"", start, length)
    head[510:] = b"\x55\xaa"
    with open(target, "wb") as disk:
        disk.write(head)
        disk.seek(first * SECTOR)
        disk.write(partition.read_bytes())
    target.chmod(0o644)
    return target


@pytest.mark.parametrize("kernel", [(), pytest.param(("--kernel", STOCK), marks=pytest.mark.stock)])
@pytest.mark.parametrize("account", ["apppot", "user"])
def test_the_partition_of_a_disk_is_mounted(
    request: pytest.FixtureRequest, place: Path, account: str, kernel: tuple[str, ...]
) -> None:
    if kernel and not os.path.exists(STOCK):
        pytest.skip("no package user-mode-linux")
    launcher: Launcher = request.getfixturevalue(account)
    (place / "tree").mkdir()
    (place / "tree" / "content").write_bytes(CONTENT)
    (place / "tree" / "content").chmod(0o644)
    # Not where partitions usually start, so that no guess hits it.
    disk = disk_of(pack(place / "tree", "ext4"), place / "disk.img", 129)
    before = disk.read_bytes()
    words = ["--network", "none", *kernel, "--changes", str(disk), IMAGE]
    done = launcher(*words, "sh", "-c", "cat /content; echo >/dev/null")
    assert (done.status, done.out) == (0, CONTENT)
    assert disk.read_bytes() == before
