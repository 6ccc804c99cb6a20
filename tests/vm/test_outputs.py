"""A job directory that is copied into the guest, and what comes back: at the end and meanwhile."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher, Running, eventually, kernels

COPY = ("--job-files", "copy")
# Everything that a file is but its contents, then these; the same command on both sides.
LISTING = (
    r"find . -mindepth 1 ! -type s -printf '%P\0%y\0%m\0%T@\0%l\0%n\0' | sort -z;"
    " find . -type f -exec sha256sum {} + | sort"
)


def copied(
    apppot: Launcher, script: str, *options: str, env: dict[str, str] | None = None
) -> bytes:
    """The stdout of a shell script that ran on a copy of the job directory."""
    return apppot(*COPY, *options, IMAGE, "sh", "-c", script, env=env).ok()


def listing(directory: Path) -> bytes:
    return subprocess.run(["sh", "-c", LISTING], cwd=directory, stdout=-1, check=True).stdout


def odd_tree(top: Path) -> None:
    """Names, modes, times and kinds that a copy may stumble over."""
    for name in (b"plain", b"two words", b"new\nline", b"\xff\xfe", b"-rf", b"a" * 255, b".hidden"):
        Path(os.fsdecode(os.path.join(os.fsencode(top), name))).write_bytes(name * 3)
    (top / "empty" / "inner").mkdir(parents=True)
    deep = top.joinpath(*["d" * 100] * 20)
    deep.mkdir(parents=True)
    (deep / "bottom").write_text("deep")
    (top / "link").symlink_to("plain")
    (top / "dangling").symlink_to("/no/where" * 30)
    (top / "out of here").symlink_to("../..")
    (top / "first").write_text("one file")
    os.link(top / "first", top / "second")
    (top / "zero").write_bytes(b"")
    with open(top / "sparse", "wb") as file:
        file.truncate(3 << 20)
        file.seek(5 << 20)
        file.write(b"end")
    for number, path in enumerate(sorted(top.rglob("*"), reverse=True)):
        if not path.is_symlink():
            path.chmod([0o400, 0o640, 0o755][number % 3] | (0o700 if path.is_dir() else 0))
        when = (10**18 + 123456789 * number, -(10**17) + 987654321 * number)[number % 2]
        os.utime(path, ns=(when, when), follow_symlinks=False)


def test_copy_in_is_exact(apppot: Launcher) -> None:
    odd_tree(apppot.work)
    expected = listing(apppot.work)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(apppot.work / "socket"))
        done = apppot(*COPY, IMAGE, "sh", "-c", f"uname -r >&2; {LISTING}")
    said = done.err.decode().splitlines()
    assert "socket is not copied into the guest" in said[0]
    assert said[1].startswith(RELEASE)
    assert done.out == expected
    assert listing(apppot.work) == expected


def test_copy_out_is_exact(apppot: Launcher) -> None:
    """What the guest has made, as the guest lists it."""
    (apppot.work / "kept").write_text("unchanged")
    (apppot.work / "replaced").write_text("old")
    (apppot.work / "grown").write_text("old ")
    script = f"""
        uname -r > replaced; printf new >> grown; touch kept-not; mkdir -p a/b/empty
        printf x > "$(printf 'a/new\\nline')"; printf y > "$(printf 'a/\\377')"; chmod 500 a/b
        ln -s ../replaced a/link; ln -s nowhere kept-link
        truncate -s 3M sparse; printf end >> sparse; chmod 640 grown
        touch -d '1999-12-31 23:59:59.123456789' grown a a/b; touch -hd @5.5 a/link
        {LISTING}
    """
    said = copied(apppot, script)
    assert (apppot.work / "replaced").read_text().startswith(RELEASE)
    assert listing(apppot.work) == said
    assert (apppot.work / "sparse").stat().st_blocks < 100


def test_owner_is_the_caller(user: Launcher) -> None:
    (user.work / "mine").write_text("")
    os.chown(user.work / "mine", user.who.uid, user.who.gid)
    (user.work / "closed").touch(0)
    script = "stat -c '%U %G' * . ; cp /bin/true new; sudo chown 7:7 new; sudo chmod 6755 new"
    done = user(*COPY, IMAGE, "sh", "-c", script)
    assert done.out == b"user user\n" * 2
    if os.getuid() == 0:  # else the file is one's own
        assert (
            done.err == b"apppot: warning: closed is not copied into the guest: Permission denied\n"
        )
    found = (user.work / "new").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (*user_ids(user), 0o755)


def user_ids(launcher: Launcher) -> tuple[int, int]:
    return launcher.who.uid, launcher.who.gid


@pytest.mark.parametrize(("confine", "megabytes"), [("bubblewrap", 100), ("landlock", 36)])
def test_large_file_both_ways(apppot: Launcher, confine: str, megabytes: int) -> None:
    """Its way in is a file on a disk, not in memory."""
    data = random.Random(24).randbytes(megabytes << 20)
    (apppot.work / "in").write_bytes(data)
    script = "uname -r; sha256sum < in; (printf 7.2; cat in) > out"
    said = copied(apppot, script, "--confine", confine, "--mem", "1G").decode().splitlines()
    assert said[0].startswith(RELEASE)
    assert said[1].split()[0] == hashlib.sha256(data).hexdigest()
    assert hashlib.sha256((apppot.work / "out").read_bytes()).digest() == (
        hashlib.sha256(b"7.2" + data).digest()
    )


def test_what_is_deleted_or_moved_in_the_guest(apppot: Launcher) -> None:
    for name in ("gone", "moved"):
        (apppot.work / name).mkdir()
        (apppot.work / name / "file").write_text(name)
    copied(apppot, "rm -r gone; mv moved there; uname -r > there/release")
    assert (apppot.work / "gone" / "file").read_text() == "gone"
    assert (apppot.work / "there" / "file").read_text() == "moved"
    assert (apppot.work / "there" / "release").read_text().startswith(RELEASE)


def test_patterns(apppot: Launcher) -> None:
    for name in ("a.in", "b.in", "c.dat", "sub/d.in", "sub/e.dat"):
        (apppot.work / name).parent.mkdir(exist_ok=True)
        (apppot.work / name).write_text(name)
    script = """
        find . -type f | sort
        mkdir -p results/x/y logs/.old; for d in results results/x results/x/y logs logs/.old; do
        uname -r > $d/t.csv; uname -r > $d/t.txt; done
    """
    options = ("--input", "*.in", "--input", "sub/e*", "--output", "results/**/*.csv")
    done = apppot(*COPY, *options, "--output", "logs", "--output", "no*", IMAGE, "sh", "-c", script)
    assert done.out == b"./a.in\n./b.in\n./sub/e.dat\n"
    assert b"nothing is there to bring back for no*" in done.err
    new = {str(p.relative_to(apppot.work)) for p in apppot.work.rglob("t.*")}
    assert new == {
        "results/t.csv", "results/x/t.csv", "results/x/y/t.csv",
        "logs/t.csv", "logs/t.txt", "logs/.old/t.csv", "logs/.old/t.txt",
    }  # fmt: skip
    assert (apppot.work / "logs/.old/t.csv").read_text().startswith(RELEASE)


def test_absolute_outputs_of_a_shared_directory(apppot: Launcher) -> None:
    script = """
        mkdir -p /tmp/out/deep; uname -r > /tmp/out/deep/one; uname -r > /tmp/x.log
        uname -r > /tmp/y.log; ln -s /tmp /tmp/out/link
    """
    outputs = ("--output", "/tmp/out", "--output", "/tmp/out/link/*.log", "--output", "/tmp/*.log")
    done = apppot(*outputs, IMAGE, "sh", "-c", script)
    assert b"/tmp/out/link/*.log" not in done.err  # a fixed part may be a link, as for any program
    for name in ("out/deep/one", "x.log", "y.log"):
        assert (apppot.work / name).read_text().startswith(RELEASE)
    assert os.readlink(apppot.work / "out" / "link") == "/tmp"


@pytest.mark.parametrize(
    ("end", "options", "status"),
    [
        ("exit 3", (), 3),
        ("kill -SEGV $$", (), 139),
        ("echo ready; sleep 60 & wait", ("--time", "1s"), 124),
        ("echo ready; sleep 60 & wait", (), 143),
    ],
)
def test_outputs_however_it_ends(
    apppot: Launcher, end: str, options: tuple[str, ...], status: int
) -> None:
    script = f"uname -r > out; head -c 3000000 /dev/zero > zeros; {end}"
    running = apppot.start(*COPY, *options, IMAGE, "sh", "-c", script)
    if status == 143:
        assert running.line() == b"ready\n"
        running.signal(signal.SIGTERM)
    assert running.finish().status == status
    assert (apppot.work / "out").read_text().startswith(RELEASE)
    assert (apppot.work / "zeros").stat().st_size == 3000000


def test_a_command_that_is_not_there(apppot: Launcher) -> None:
    assert apppot(*COPY, IMAGE, "no-such").status == 127


# -- in the middle -------------------------------------------------------------------------------

BIG = "dd if=/dev/zero of=out bs=1M count=200 2>&-; uname -r > release; echo written"


def in_the_middle(apppot: Launcher) -> Running:
    """A run whose 200 MB file is on its way back, under the name of one that was there before."""
    (apppot.work / "out").write_text("before")
    running = apppot.start("--mem", "1G", *COPY, IMAGE, "sh", "-c", BIG)
    assert running.line() == b"written\n"

    def under_way() -> bool:
        for fd in Path(f"/proc/{running.pid}/fd").iterdir():
            link = os.readlink(fd)
            if link.startswith(f"{apppot.work}/#") and fd.stat().st_size > 1 << 20:
                return True
        return False

    assert eventually(under_way)
    return running


def unchanged(apppot: Launcher) -> bool:
    return os.listdir(apppot.work) == ["out"] and (apppot.work / "out").read_text() == "before"


def test_launcher_killed_in_the_middle(apppot: Launcher) -> None:
    running = in_the_middle(apppot)
    running.signal(signal.SIGKILL)
    running.wait()
    assert unchanged(apppot)
    apppot.await_nothing_left()


def test_launcher_ended_in_the_middle(apppot: Launcher) -> None:
    running = in_the_middle(apppot)
    running.signal(signal.SIGTERM)
    assert running.wait() == 143
    assert unchanged(apppot)


def test_machine_killed_in_the_middle(apppot: Launcher) -> None:
    running = in_the_middle(apppot)
    for pid in kernels(apppot.marker):
        os.kill(pid, signal.SIGKILL)
    assert running.finish().status == 125
    assert unchanged(apppot)


# -- what cannot be --------------------------------------------------------------------------------


def test_guest_without_room(apppot: Launcher) -> None:
    (apppot.work / "in").write_bytes(os.urandom(80 << 20))
    done = apppot(*COPY, "--mem", "64M", IMAGE, "true")
    done.failed("job directory's files do not fit into the guest", "--scratch")
    assert copied(apppot, "stat -c %s in", "--mem", "64M", "--scratch", "1G") == b"83886080\n"


def test_host_that_refuses_a_file(apppot: Launcher) -> None:
    """A limit on the size of files stands for a full disk: the same call fails."""
    (apppot.work / "large").write_text("before")
    (apppot.work / "folder" / "inner").mkdir(parents=True)
    script = """
        ulimit -f unlimited; head -c 3000000 /dev/urandom > large; uname -r > small
        rm -r folder; echo file > folder; exit 9
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))

    text = apppot(*COPY, IMAGE, "sh", "-c", script, before_exec=limit).failed(
        "ended with status 9", "large: File too large", "folder: "
    )
    assert "small" not in text
    assert (apppot.work / "large").read_text() == "before"
    assert (apppot.work / "small").read_text().startswith(RELEASE)
    assert sorted(os.listdir(apppot.work)) == ["folder", "large", "small"]


def frame(kind: int, payload: bytes, stream: int = 128) -> str:
    """A frame as the argument of printf."""
    data = bytes((kind, stream)) + len(payload).to_bytes(4, "little") + payload
    return "".join(f"\\{byte:03o}" for byte in data)


@pytest.mark.parametrize(
    ("path", "options"),
    [(b"Li4vZXNjYXBlZA==", COPY), (b"ZXNjYXBlZA==", ())],  # ../escaped, escaped
)
def test_guest_that_writes_frames_of_its_own(
    apppot: Launcher, path: bytes, options: tuple[str, ...]
) -> None:
    head = b'{"id": 7, "kind": "file", "path": "%s", "mode": 420, "mtime": 0, "size": 0}' % path
    frames = frame(9, head) + frame(11, b'{"id": 7}')
    script = f"sudo sh -c \"printf '{frames}' > /dev/ttyS0\"; sleep 60"
    apppot(*options, IMAGE, "sh", "-c", script).failed("broke the channel's protocol")
    assert not list(apppot.work.parent.rglob("escaped"))


def test_a_session_keeps_none_of_it(apppot: Launcher) -> None:
    (apppot.work / "in").write_text("x")
    env = {"XDG_DATA_HOME": str(apppot.state / "data"), "APPPOT_SITE_STORE": site_store()}
    script = "uname -r > out; sudo touch /kept"
    copied(apppot, script, "--session", "s", env={**env, "APPPOT_POT": pot()})
    assert (apppot.work / "out").read_text().startswith(RELEASE)
    words = ("--session", "s", "--job-dir", "none", IMAGE, "ls", "/kept", "/home/user/job")
    done = apppot(*words, env={**env, "APPPOT_POT": pot()})
    assert done.out == b"/kept\n"


def site_store() -> str:
    return str(Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "apppot")


def pot() -> str:
    from apppot.host.common import paths

    return paths.pot_home()


# -- while it runs ---------------------------------------------------------------------------------

PLACES = pytest.mark.parametrize(
    ("options", "folder"), [(COPY, "new/dir"), ((), "/tmp/new/dir")], ids=["copied", "absolute"]
)


def followed(apppot: Launcher, options: tuple[str, ...], folder: str, script: str) -> Running:
    """A run that follows the file `log` in `folder`, which is not there when it begins."""
    words = (*options, "--follow", f"{folder}/log", IMAGE, "sh", "-c", script, "sh", folder)
    return apppot.start(*words, stdin=subprocess.PIPE)


def host_file(apppot: Launcher, folder: str) -> Path:
    return apppot.work / (folder if folder[0] != "/" else "") / "log"


def shows(path: Path) -> Callable[[bytes], bool]:
    def look(text: bytes) -> bool:
        return eventually(lambda: path.is_file() and path.read_bytes() == text)

    return look


@PLACES
def test_a_followed_file_grows_while_the_job_runs(
    apppot: Launcher, options: tuple[str, ...], folder: str
) -> None:
    """The job goes on when it is told what this host has read of it."""
    script = """
        mkdir -p "$1"; cd "$1"; exec > log; uname -r; read answer; echo "$answer"
        head -c 5000000 /dev/urandom; touch -d @1000000000 log; chmod 600 log; sha256sum < log >&2
    """
    running = followed(apppot, options, folder, script)
    path = host_file(apppot, folder)
    assert eventually(lambda: path.is_file() and path.read_bytes().endswith(b"\n"))
    release = path.read_bytes()
    assert release.decode().startswith(RELEASE)
    done = running.finish(b"seen " + release)
    data = path.read_bytes()
    assert data.startswith(release + b"seen " + release)
    assert (done.status, done.err.split()[0].decode()) == (0, hashlib.sha256(data).hexdigest())
    assert (path.stat().st_mtime, path.stat().st_mode & 0o777) == (1e9, 0o600)


@PLACES
def test_a_followed_file_is_cut_and_replaced(
    apppot: Launcher, options: tuple[str, ...], folder: str
) -> None:
    script = """
        mkdir -p "$1"; cd "$1"; echo first line > log; read x
        : > log; echo cut >> log; read x
        mv log log.1; read x; echo "$x" > log; read x
        echo other > other; mv other log; read x
        printf OTHER 1<>log; read x; rm -r "$PWD"
    """
    running = followed(apppot, options, folder, script)
    assert running.process.stdin is not None
    shown = shows(host_file(apppot, folder))
    steps = [
        (b"first line\n", b"\n"), (b"cut\n", b"\n"), (b"cut\n", b"anew\n"), (b"anew\n", b"\n"),
        (b"other\n", b"\n"),
    ]  # fmt: skip
    for text, answer in steps:
        assert shown(text), text
        running.process.stdin.write(answer)
    assert running.finish(b"\n").status == 0
    # Written in its middle: that shows when the job has ended, also for a file that is gone.
    assert host_file(apppot, folder).read_bytes() == b"OTHER\n"


def test_a_followed_file_that_was_there_before(apppot: Launcher) -> None:
    """What this host has is not sent again: its file goes on."""
    path = apppot.work / "log"
    path.write_bytes(b"old\n")
    inode = path.stat().st_ino
    running = followed(apppot, COPY, ".", "uname -r >> log; read x; echo $x >> log")
    assert eventually(lambda: len(path.read_bytes().splitlines()) == 2)
    assert running.finish(b"end\n").status == 0
    old, release, end = path.read_text().splitlines()
    assert (old, release[:3], end) == ("old", RELEASE, "end")
    assert path.stat().st_ino == inode


def test_a_file_that_is_never_there(apppot: Launcher) -> None:
    done = apppot("--follow", "/tmp/none", IMAGE, "sh", "-c", "exit 5")
    assert done.status == 5
    assert b"nothing is there to bring back for none" in done.err
    assert os.listdir(apppot.work) == []


def test_a_followed_file_of_a_shared_directory(apppot: Launcher) -> None:
    assert apppot("--follow", "log", IMAGE, "sh", "-c", "uname -r | tee log").ok().startswith(b"7.")
    assert (apppot.work / "log").read_text().startswith(RELEASE)
