"""One directory, used by processes of the host and of several guests at once.

What each of them does and finds there is what it would do and find if all were on one machine.
"""

from __future__ import annotations

import os
import select
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.harness import fileops
from tests.harness.vm import IMAGE, RELEASE, Launcher

# Others on demand: a new seed is a search for faults, for which a day is a better time than CI.
RANDOM_SECONDS = float(os.environ.get("VM_TESTS_RANDOM_SECONDS", "30"))
SEED = int(os.environ.get("VM_TESTS_SEED", "11"))


# Before the text of a Python program, for a guest that has it from this host.
IN_GUEST = ("--network", "none", "host", "python3", "-c")


@pytest.fixture
def directories(user: Launcher, place: Path) -> tuple[Path, Path]:
    """The shared one, and the one of the comparison on the host alone; of one file system."""
    made = place / "shared", place / "alone"
    for path in made:
        path.mkdir()
        os.chown(path, user.who.uid, user.who.gid)
    return made


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """`process`, with pipes, until the end of the block."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(seconds: float) -> Callable[[int], bool]:
    deadline = time.monotonic() + seconds
    return lambda _: time.monotonic() > deadline


@pytest.mark.timeout(RANDOM_SECONDS + 120)
@pytest.mark.parametrize("confine", ["bubblewrap", "landlock"])
def test_random_operations(user: Launcher, directories: tuple[Path, Path], confine: str) -> None:
    """Of two guests, one with two processes, and the host; each result is as on one machine."""
    shared, alone = directories
    guests = []
    for workers in (2, 1):
        words = ("--confine", confine, "--network", "none", "host", *fileops.command(workers))
        running = user.start(*words, cwd=shared, stdin=subprocess.PIPE, stderr=None)
        guests.append(fileops.Side(running.process, workers))
    assert all(side.release.startswith(RELEASE) for side in guests)
    with (
        ended(fileops.native(shared, 2, user.who)) as host,
        ended(fileops.native(alone, 5, user.who)) as reference,
    ):
        sides = [*guests, fileops.Side(host, 2)]
        compared = fileops.Side(reference, 5)
        count, difference = fileops.first_difference(sides, compared, SEED, until(RANDOM_SECONDS))
    assert difference is None, f"after {count} operations, VM_TESTS_SEED={SEED}\n{difference}"
    print(f"{count} operations, seed {SEED}")
    assert count > 1000


# -- appending and making ------------------------------------------------------------------------

LINES = 300
APPEND = {
    "opened each time": 'i=0; while [ $i -lt %d ]; do i=$((i+1)); echo "$0 $i %s" >> log; done',
    "held open": 'exec >> log; i=0; while [ $i -lt %d ]; do i=$((i+1)); echo "$0 $i %s"; done',
}


@pytest.mark.parametrize("how", APPEND)
def test_appended_lines_are_all_there_and_whole(apppot: Launcher, how: str) -> None:
    """Of three guests and the host, which all append to one file at once."""
    script, filling = APPEND[how], "x" * 150
    script = script % (LINES, filling)
    options = ("--network", "none", IMAGE)
    guests = [
        apppot.start(*options, "sh", "-c", f"uname -r; {script}", f"guest{number}")
        for number in range(3)
    ]
    assert all(guest.line().decode().startswith(RELEASE) for guest in guests)
    subprocess.run(["sh", "-c", script, "host"], cwd=apppot.work, check=True)
    for guest in guests:
        guest.finish().ok()
    found = (apppot.work / "log").read_text().splitlines()
    writers = ("host", "guest0", "guest1", "guest2")
    assert sorted(found) == sorted(
        f"{who} {number} {filling}" for who in writers for number in range(1, LINES + 1)
    )
    for who in writers:
        own = [int(line.split()[1]) for line in found if line.startswith(f"{who} ")]
        assert own == sorted(own)


MAKE = """
import os, sys
print(os.uname().release, flush=True)
sys.stdin.readline()
won = 0
for number in range(400):
    try:
        os.close(os.open(f"made{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        won += 1
    except FileExistsError:
        pass
print(won)
"""


def test_one_only_makes_a_file(apppot: Launcher) -> None:
    """With O_EXCL, which is how programs lock by a file."""
    guests = [apppot.start(*IN_GUEST, MAKE, stdin=subprocess.PIPE) for _ in range(2)]
    assert all(guest.line().decode().startswith(RELEASE) for guest in guests)
    for guest in guests:
        assert guest.process.stdin is not None
        guest.process.stdin.write(b"go\n")
    own = subprocess.run(
        ["python3", "-c", MAKE], cwd=apppot.work, input=b"go\n", stdout=subprocess.PIPE, check=True
    ).stdout
    won = [int(own.split()[-1]), *(int(guest.finish().ok()) for guest in guests)]
    assert sum(won) == 400
    assert sum(count > 0 for count in won) > 1, "they did not run at the same time"


@pytest.mark.parametrize("hypervisor", ["uml", "qemu"])
def test_a_file_that_the_host_lets_grow_is_followed(apppot: Launcher, hypervisor: str) -> None:
    log = apppot.work / "log"
    log.write_text("first\n")
    # On 9p tail waits for inotify, which tells of the guest's own changes only.
    follow = "uname -r; exec tail ---disable-inotify -s 0.2 -n +1 -f log"
    if hypervisor == "uml":
        follow = "uname -r; exec tail -n +1 -f log"
    options = ("--hypervisor", hypervisor, "--network", "none", IMAGE)
    running = apppot.start(*options, "sh", "-c", follow)
    assert running.line().decode().startswith(RELEASE)
    assert running.line() == b"first\n"
    for number in range(5):
        with log.open("a") as file:
            file.write(f"line {number}\n")
        assert running.line() == f"line {number}\n".encode()


@pytest.mark.parametrize("mode", ["rw", "ro"])
def test_a_bind_shows_what_is_there_now(apppot: Launcher, place: Path, mode: str) -> None:
    """A file that is in use in the guest and replaced on the host, by its name and as it was."""
    other = place / "other"
    other.mkdir()
    (other / "file").write_text("old")
    script = "uname -r; exec 3< /mnt/file; echo open; read go; cat /mnt/file; cat <&3; ls /mnt"
    bind = f"{other}:/mnt:{mode}"
    running = apppot.start("--bind", bind, IMAGE, "sh", "-c", script, stdin=subprocess.PIPE)
    assert running.line().decode().startswith(RELEASE)
    assert running.line() == b"open\n"
    (other / "new").write_text("new ")
    (other / "new").rename(other / "file")
    (other / "more").touch()
    assert running.finish(b"\n").ok() == b"new oldfile\nmore\n"


# -- locks ---------------------------------------------------------------------------------------

LOCKS = (Path(__file__).parent / "programs" / "locks.py").read_text()
KINDS = ("flock", "record", "file")
Start = Callable[..., "Holder"]


class Holder:
    """A process that holds a lock, or tries to; on the host or in a guest."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def is_silent(self) -> bool:
        """For a moment: what it says next has not been said."""
        assert self.process.stdout is not None
        return not select.select([self.process.stdout], [], [], 0.3)[0]

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")


@pytest.fixture
def holder(apppot: Launcher) -> Iterator[Start]:
    """Starts `locks.py` on one side, with these words."""
    with ExitStack() as stack:

        def start(side: str, *words: str) -> Holder:
            if side == "guest":
                running = apppot.start(*IN_GUEST, LOCKS, *words, stdin=subprocess.PIPE)
                return Holder(running.process)
            process = subprocess.Popen(
                ("python3", "-c", LOCKS, *words),
                cwd=apppot.work,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
            return Holder(stack.enter_context(ended(process)))

        yield start


def held_on(side: str) -> str:
    return f"held {RELEASE if side == 'guest' else os.uname().release}"


SIDES = (("host", "guest"), ("guest", "host"), ("guest", "guest"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", SIDES, ids="-".join)
def test_a_lock_holds_on_the_other_side(holder: Start, sides: tuple[str, str], kind: str) -> None:
    """One that waits for it gets it when it is let go; shared ones are shared."""
    first = holder(sides[0], kind, "write", "now")
    assert first.says().startswith(held_on(sides[0]))
    assert holder(sides[1], kind, "read", "now").says() == "busy"
    waiting = holder(sides[1], kind, "read", "wait")
    assert waiting.says() == "alive"
    assert waiting.is_silent()
    first.go_on()
    assert first.says() == "free"
    assert waiting.says().startswith(held_on(sides[1]))
    assert holder(sides[0], kind, "read", "now").says().startswith(held_on(sides[0]))
    assert holder(sides[0], kind, "write", "now").says() == "busy"


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_goes_with_the_machine_that_held_it(holder: Start, kind: str) -> None:
    first = holder("guest", kind, "write", "now")
    assert first.says().startswith(held_on("guest"))
    waiting = holder("host", kind, "write", "wait")
    assert waiting.says() == "alive"
    assert waiting.is_silent()
    first.process.kill()
    assert waiting.says().startswith("held")


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_ends_the_waiting(holder: Start, kind: str) -> None:
    first = holder("host", kind, "write", "now")
    assert first.says().startswith("held")
    waiting = holder("guest", kind, "write", "wait")
    assert waiting.says() == "alive"
    assert waiting.is_silent()
    waiting.process.send_signal(signal.SIGUSR1)
    assert waiting.says() == "interrupted"
    # And it has left nothing behind that would take the lock later.
    first.go_on()
    assert first.says() == "free"
    assert holder("host", kind, "write", "now").says().startswith("held")


DEADLOCK = """
import errno, fcntl, os
print(os.uname().release, flush=True)
def lock(byte):
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, byte)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "locked"
fd = os.open("pair", os.O_RDWR | os.O_CREAT)
ready, child_ready = os.pipe()
lock(0)
if os.fork() == 0:
    lock(1)
    os.write(child_ready, b"x")
    print(lock(0), flush=True)
    os._exit(0)
os.read(ready, 1)
print(lock(1), flush=True)
os.close(fd)
os.wait()
"""


def test_a_deadlock_is_reported(apppot: Launcher) -> None:
    """To one of two processes of a guest; when that one has gone the other gets its lock."""
    out = apppot(*IN_GUEST, DEADLOCK).ok().decode()
    release, *rest = out.split()
    assert release.startswith(RELEASE)
    assert sorted(rest) == ["EDEADLOCK", "locked"]


# -- mappings ------------------------------------------------------------------------------------

PING_PONG = """
import mmap, os, sys
first = sys.argv[1] == "first"
print(os.uname().release, flush=True)
with open("memory", "r+b") as file:
    shared = mmap.mmap(file.fileno(), 0)
for turn in range(200):
    at = turn * 2711 % len(shared)
    if first:
        shared[at] = 1
    while shared[at] != (2 if first else 1):
        pass
    if not first:
        shared[at] = 2
print("done", sum(shared[:]))
"""


@pytest.mark.parametrize("other", ["host", "guest"])
def test_what_is_mapped_shared_is_one_memory(apppot: Launcher, other: str) -> None:
    """Each waits for the other's next store, on pages all over the file."""
    (apppot.work / "memory").write_bytes(bytes(50 * 4096))
    words = (*IN_GUEST, PING_PONG)
    first = apppot.start(*words, "first")
    if other == "guest":
        second = apppot.start(*words, "second")
        assert second.line().decode().startswith(RELEASE)
        said = second.line()
    else:
        command = ["python3", "-c", PING_PONG, "second"]
        said = subprocess.run(
            command, cwd=apppot.work, stdout=subprocess.PIPE, check=True
        ).stdout.splitlines(keepends=True)[1]
    assert said == b"done 400\n"
    release, found = first.finish().ok().splitlines(keepends=True)
    assert release.decode().startswith(RELEASE)
    assert found == said
    assert sum((apppot.work / "memory").read_bytes()) == 400


CUT = """
import mmap, os, sys
print(os.uname().release, flush=True)
with open("memory", "r+b") as file:
    shared = mmap.mmap(file.fileno(), 0)
assert shared[5000] == 7
shared[5001] = 8
print("mapped", flush=True)
sys.stdin.readline()
# The kernel itself reads there for us …
out = os.open("copy", os.O_CREAT | os.O_WRONLY)
try:
    os.write(out, memoryview(shared)[4096:8192])
except OSError:
    pass
# … and then a process of its own.
if os.fork() == 0:
    shared[5000]
    os._exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_a_mapped_file_that_the_host_cuts(apppot: Launcher) -> None:
    """Ends a process that goes on there, as it does on the host, and not the machine."""
    memory = apppot.work / "memory"
    memory.write_bytes(bytes([7]) * 8192)
    running = apppot.start(*IN_GUEST, CUT, stdin=subprocess.PIPE)
    assert running.line().decode().startswith(RELEASE)
    assert running.line() == b"mapped\n"
    os.truncate(memory, 100)
    out = running.finish(b"\n").ok().decode().split()
    assert out == [str(-signal.SIGBUS)]
    assert memory.stat().st_size == 100


# -- databases -----------------------------------------------------------------------------------

INSERT = """
import os, sqlite3, sys
who, count = sys.argv[1], int(sys.argv[2])
print(os.uname().release, flush=True)
base = sqlite3.connect("base", timeout=60, isolation_level=None)
for number in range(count):
    base.execute("begin immediate")
    base.execute("update total set sum = sum + 1")
    base.execute("insert into rows values (?, ?)", (who, number))
    base.execute("commit")
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_a_database_from_all_sides_at_once(apppot: Launcher, mode: str) -> None:
    """Nothing is lost, nothing is corrupt: four guests and the host insert and count."""
    with sqlite3.connect(apppot.work / "base") as base:
        base.execute(f"pragma journal_mode = {mode}")
        base.execute("create table rows (who text, number int)")
        base.execute("create table total (sum int)")
        base.execute("insert into total values (0)")
    base.close()
    words = (*IN_GUEST, INSERT)
    guests = [apppot.start(*words, f"guest{number}", "40") for number in range(4)]
    assert all(guest.line().decode().startswith(RELEASE) for guest in guests)
    command = ["python3", "-c", INSERT, "host", "40"]
    subprocess.run(command, cwd=apppot.work, check=True, stdout=subprocess.DEVNULL)
    for guest in guests:
        guest.finish(timeout=100).ok()
    with sqlite3.connect(apppot.work / "base") as base:
        assert base.execute("pragma integrity_check").fetchall() == [("ok",)]
        assert base.execute("select sum from total").fetchall() == [(200,)]
        assert base.execute("select count(distinct who || number) from rows").fetchall() == [(200,)]
    base.close()
