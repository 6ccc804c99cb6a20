"""The original's command line: images, pairs, changes, jobs, and who the guest's user is."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from apppot.host.images.resolve import resolve
from apppot.host.pot import layout

from tests.harness.layers import apart, busybox_tree
from tests.harness.vm import IMAGE, RELEASE, Launcher, Result, Who, myself

Factory = Callable[[Who], Launcher]
START = "from apppot.host.original.start import main; main()"
APPLETS = ("sh", "cat", "id", "ls", "mkdir", "rm", "sha256sum", "stat", "sync", "uname")


@pytest.fixture
def apart_from(place: Path) -> Callable[[Who], Who]:
    """Accounts whose automatic sessions are this test's own."""
    return lambda who: apart(who, place / "data")


def original(who: Who) -> Who:
    """The account with `apppot-start` where the harness says `apppot run`."""
    program = f"'{Path(who.command[0]).with_name('apppot-start')}'"
    if who.command[0] == "/usr/bin/python3":
        program = f"/usr/bin/python3 -c '{START}'"
    return dataclasses.replace(who, command=("/bin/sh", "-c", f'shift; exec {program} "$@"', "sh"))


@pytest.fixture
def start(launcher_for: Factory, apart_from: Callable[[Who], Who]) -> Launcher:
    """`apppot-start` by the account that runs the tests."""
    return launcher_for(original(apart_from(myself())))


@pytest.fixture
def user_start(launcher_for: Factory, ordinary: Who, apart_from: Callable[[Who], Who]) -> Launcher:
    """`apppot-start` by an ordinary user."""
    return launcher_for(original(apart_from(ordinary)))


@pytest.fixture
def disk(place: Path) -> Path:
    """A small ext4 image: busybox, and files of root and of `user`."""
    tree = place / "tree"
    busybox_tree(tree, APPLETS)
    (tree / "srv").mkdir()
    (tree / "srv" / "free").mkdir()
    (tree / "srv" / "free").chmod(0o1777)
    image = place / "disk.ext4"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(image), "32M"], check=True, timeout=60
    )
    image.chmod(0o644)
    return image


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def said(result: Result) -> bytes:
    assert result.status == 0, result
    return result.out


def test_it_runs_a_command_and_returns_its_status(start: Launcher) -> None:
    words = ["a b", "c'd", '"', "$x", "", "--mem"]
    script = 'uname -r; pwd; for w; do printf "<%s>" "$w"; done; exit 7'
    done = start("--apppot", IMAGE, "--mem", "200", "--", "sh", "-c", script, "sh", *words)
    release, directory, rest = done.out.split(b"\n", 2)
    assert done.status == 7
    assert done.err.startswith(f"apppot-start: what is written over {IMAGE} is kept".encode())
    assert release.decode().startswith(RELEASE)
    assert directory == b"/home/user/job"
    assert rest == b"".join(b"<%s>" % word.encode() for word in words)


def test_options_end_at_the_command(start: Launcher) -> None:
    assert said(start("--image", IMAGE, "echo", "--mem", "-X")) == b"--mem -X\n"


def test_memory_kernel_and_image_come_from_the_environment(start: Launcher) -> None:
    kernel = layout.find_pot().kernel.path
    env = {"APPPOT_IMAGE": IMAGE, "APPPOT_MEM": "300M", "APPPOT_KERNEL": kernel}
    out = said(start("sh", "-c", "grep MemTotal /proc/meminfo", env=env))
    assert 250_000 < int(out.split()[1]) <= 300 << 10


def test_the_default_image_is_a_file_here(start: Launcher) -> None:
    (start.work / "apppot.img").symlink_to(resolve(IMAGE).path)
    assert said(start("echo", "in")) == b"in\n"


def test_extra_words_reach_the_kernel(start: Launcher) -> None:
    words = ["-X", "loglevel=3 one.more=1", "--extra", "two.more=2", "--id", "me", "--slirp", "/x"]
    line = said(start("--apppot", IMAGE, *words, "cat", "/proc/cmdline")).split()
    assert {b"loglevel=3", b"one.more=1", b"two.more=2"} <= set(line)


def test_the_job_script_runs_where_no_command_is_given(start: Launcher) -> None:
    script = start.work / "apppot-run"
    script.write_text("#!/bin/sh\necho run $# $(uname -r)\nexit 5\n")
    script.chmod(0o755)
    done = start("--apppot", IMAGE)
    assert done.status == 5
    assert done.out.startswith(f"run 0 {RELEASE}".encode())
    script.chmod(0o644)
    assert start("--apppot", IMAGE, feed=b"echo shell; exit 4\n").out == b"shell\n"


def test_the_images_autorun_runs_where_there_is_no_job_script(start: Launcher, place: Path) -> None:
    home = place / "changes" / "home" / "user"
    home.mkdir(parents=True)
    (home / "apppot-autorun").write_text("#!/bin/sh\necho auto; exit 6\n")
    (home / "apppot-autorun").chmod(0o755)
    archive = place / "user.changes.tar.gz"
    subprocess.run(["tar", "-C", place / "changes", "-czf", archive, "."], check=True)
    done = start("--apppot", IMAGE, "--changes", str(archive))
    assert (done.status, done.out) == (6, b"auto\n")
    # Converted once: the second start finds it.
    again = start("--apppot", IMAGE, "--merge", str(archive), "cat", "/home/user/apppot-autorun")
    assert b"reading" not in again.err
    assert b"echo auto" in said(again)


def test_changes_that_are_a_file_system_are_mounted(start: Launcher, place: Path) -> None:
    (place / "c" / "etc").mkdir(parents=True)
    (place / "c" / "etc" / "motd").write_text("changed\n")
    image = place / "c.squashfs"
    subprocess.run(["mksquashfs", place / "c", image, "-quiet", "-no-progress"], check=True)
    words = ["--apppot", IMAGE, "--changes", str(image), "cat", "/etc/motd"]
    assert said(start(*words)) == b"changed\n"


def test_a_pair_keeps_changes_and_leaves_the_image_alone(start: Launcher, disk: Path) -> None:
    before = digest(disk)
    pair = f"my.cow:{disk}"
    script = "echo $1 >>/srv/free/kept; cat /srv/free/kept; uname -r"
    first = start("--apppot", pair, "sh", "-c", script, "sh", "one").ok()
    second = start("--apppot", pair, "sh", "-c", script, "sh", "two").ok()
    assert first.startswith(b"one\n" + RELEASE.encode())
    assert second.startswith(b"one\ntwo\n" + RELEASE.encode())
    assert digest(disk) == before
    cow = start.work / "my.cow"
    assert cow.stat().st_blocks * 512 < disk.stat().st_size
    assert str(disk).encode() in cow.read_bytes()[:4200]
    # Another state of the image: its sectors would not fit any more.
    os.utime(disk, (1, 1))
    start("--apppot", pair, "true").failed("another state", "remedy")


def test_what_a_pair_kept_is_a_sound_file_system(start: Launcher, disk: Path) -> None:
    script = "mkdir /srv/free/d; sync; (sleep 60 >/srv/free/open &) ; echo x >/srv/free/d/f"
    start("--apppot", f"my.cow,{disk}", "sh", "-c", script).ok()
    merged = start.work / "merged"
    flatten(start.work / "my.cow", disk, merged)
    subprocess.run(["e2fsck", "-fn", merged], check=True, capture_output=True)
    state = subprocess.run(["dumpe2fs", "-h", merged], capture_output=True, text=True, check=True)
    assert "needs_recovery" not in state.stdout


def flatten(cow: Path, image: Path, target: Path) -> None:
    """The image with the sectors of the COW file in their places."""
    shutil.copyfile(image, target)
    size = image.stat().st_size
    data = cow.read_bytes()
    bitmap, start = data[8192 : 8192 + size // 512 // 8], len(data) - size
    with open(target, "r+b") as out:
        for sector in range(size // 512):
            if bitmap[sector // 8] >> (sector % 8) & 1:
                out.seek(sector * 512)
                out.write(data[start + sector * 512 :][:512])


def test_an_ordinary_user_is_user_and_files_are_kept_as_users(
    user_start: Launcher, ordinary: Who, disk: Path
) -> None:
    script = "id -u; id -un; echo mine >/srv/free/mine; stat -c %U /srv/free/mine; cat x; echo >y"
    (user_start.work / "x").write_text("x\n")
    out = said(user_start("--apppot", f"c.cow:{disk}", "sh", "-c", script))
    assert out == f"{ordinary.uid}\nuser\nuser\nx\n".encode()
    assert (user_start.work / "y").stat().st_uid == ordinary.uid
    merged = user_start.work / "merged"
    flatten(user_start.work / "c.cow", disk, merged)
    command = ["debugfs", "-R", "stat /srv/free/mine", str(merged)]
    stat = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    owner = 1000 if ordinary.uid else 0
    assert f"User: {owner:5d}" in stat


KEEP = 'uname -r; echo "$1" >>/srv/free/kept; cat /srv/free/kept'


def test_an_image_alone_keeps_what_is_written(start: Launcher, disk: Path) -> None:
    before = digest(disk)
    first = start("--apppot", str(disk), "sh", "-c", KEEP, "sh", "one")
    assert said(first).startswith(RELEASE.encode()) and first.out.endswith(b"\none\n")
    assert first.err.count(b"\n") == 1 and b"kept as session disk.ext4" in first.err
    second = start("--apppot", str(disk), "sh", "-c", KEEP, "sh", "two")
    assert second.ok().endswith(b"\none\ntwo\n")
    assert digest(disk) == before
    # The same session for `apppot`: to look at, to save, to commit, to begin afresh.
    session(start, "rm", "disk.ext4")
    assert said(start("--apppot", str(disk), "sh", "-c", KEEP, "sh", "new")).endswith(b"\nnew\n")


def session(start: Launcher, *words: str) -> bytes:
    """`apppot session WORDS` by the same user, who has to be the tests' own."""
    command = [*myself().command, "session", *words]
    return subprocess.run(command, env=start.environment(), check=True, capture_output=True).stdout


def test_images_of_a_store_have_sessions_of_their_names(start: Launcher) -> None:
    script = "echo x >/srv/x"
    assert start("--apppot", IMAGE, "-X", "a=1", "sh", "-c", script).status == 0
    assert start("--apppot", f"{IMAGE}:1", "cat", "/srv/x").ok() == b"x\n"
    assert [line.split()[:2] for line in session(start, "list").decode().splitlines()[1:]] == [
        [IMAGE, IMAGE]
    ]


def test_two_files_of_one_name_have_two_sessions(start: Launcher, disk: Path) -> None:
    (start.work / "other").mkdir()
    other = shutil.copy(disk, start.work / "other" / disk.name)
    kept = []
    for image, word in ((str(disk), "a"), (other, "b"), (str(disk), "c"), (other, "d")):
        kept.append(said(start("--apppot", str(image), "sh", "-c", KEEP, "sh", word)).split()[1:])
    assert kept == [[b"a"], [b"b"], [b"a", b"c"], [b"b", b"d"]]
    names = [line.split()[0] for line in session(start, "list").decode().splitlines()[1:]]
    assert len(names) == 2 and names[0] == "disk.ext4" and names[1].startswith("disk.ext4-")


def test_a_session_in_use_says_who_has_it(start: Launcher, disk: Path) -> None:
    running = start.start("--apppot", str(disk), "sh", "-c", "uname -r; cat", stdin=subprocess.PIPE)
    assert running.line().decode().startswith(RELEASE)
    text = start("--apppot", str(disk), "uname").failed("in use by process", "COW:IMG")
    assert str(running.pid) in text or "on " in text
    assert running.finish(b"end").out == b"end"


def test_another_file_under_the_name_is_noticed(start: Launcher, disk: Path) -> None:
    assert start("--apppot", str(disk), "uname").status == 0
    with open(disk, "r+b") as image:
        image.seek(-1, os.SEEK_END)
        image.write(b"x")
    start("--apppot", str(disk), "uname").failed("belongs to", "apppot session rm disk.ext4")


def test_what_cannot_be_written_has_no_session(user_start: Launcher, disk: Path) -> None:
    """As the original opens such an image: several at once, and nothing stays."""
    if os.getuid() != 0:
        disk.chmod(0o444)
    for _ in range(2):
        out = user_start("--apppot", str(disk), "sh", "-c", KEEP, "sh", "x").ok()
        assert out.endswith(b"\nx\n") and out.count(b"x\n") == 1


def test_no_place_for_sessions_is_said(user_start: Launcher, disk: Path, place: Path) -> None:
    disk.chmod(0o666)
    (place / "data").chmod(0o555)
    if os.getuid() == 0:
        os.chown(place / "data", 0, 0)
    done = user_start("--apppot", str(disk), "sh", "-c", KEEP, "sh", "x")
    assert said(done).endswith(b"\nx\n")
    assert b"nothing is kept" in done.err


def test_with_changes_the_image_is_not_written_to(start: Launcher, disk: Path, place: Path) -> None:
    (place / "c" / "etc").mkdir(parents=True)
    subprocess.run(["mksquashfs", place / "c", place / "c.squashfs", "-quiet"], check=True)
    words = ["--apppot", str(disk), "--changes", str(place / "c.squashfs")]
    for _ in range(2):
        done = start(*words, "sh", "-c", KEEP, "sh", "x")
        assert said(done).count(b"x\n") == 1
        assert b"is not written to: other changes are lost" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--apppt", "x"], "did you mean --apppot"),
        (["--apppot"], "needs a value"),
        (["--apppot", "./none.img", "true"], "does not exist"),
        (["--apppot", "x.cow:./none.img", "true"], "does not exist"),
        (["true"], "there is no image 'apppot.img'"),
    ],
)
def test_a_wrong_command_line_is_explained(start: Launcher, words: list[str], message: str) -> None:
    start(*words).failed(message, "remedy")


def test_a_pair_over_what_cannot_be_written_is_explained(start: Launcher) -> None:
    image = resolve(IMAGE).path
    start("--apppot", f"x.cow:{image}", "true").failed("squashfs", "ext2/3/4")
    assert not (start.work / "x.cow").exists()
