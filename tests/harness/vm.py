"""What the VM tests share: a launcher as a subprocess, and finding what a run left behind.

Every launcher of a test has a directory of its own for run directories; what lies in it, or
mentions it in an argument or a mount, belongs to that test.
"""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apppot.host.common.errors import ImageError
from apppot.host.images import store
from apppot.host.images.building import builder, recipe
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import user_store

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 40.0
IMAGE = "debian-12"
RELEASE = "7.2"

Word = str | bytes


def embedded_image() -> str:
    """Path of the image that carries the agent, built where the store's agent is another."""
    wanted = recipe.load("debian-12-embedded")
    try:
        found = resolve(wanted.name)
        files = [file.path.lstrip("/") for file in wanted.files]
        command = ["unsquashfs", "-cat", found.path, *files]
        listed = subprocess.run(command, capture_output=True, check=False).stdout
        if listed == b"".join([file.content for file in wanted.files]):
            return found.path
    except ImageError:
        pass
    return store.blob_path(user_store(), builder.build(wanted)[0])


@dataclass(frozen=True)
class Result:
    """What one launcher left: exit status (negative for a signal), stdout, stderr."""

    status: int
    out: bytes
    err: bytes

    def ok(self) -> bytes:
        """The stdout of a run that succeeded and said nothing on stderr."""
        assert (self.status, self.err) == (0, b""), self
        return self.out

    def failed(self, *words: str) -> str:
        """The stderr of a run in which AppPot failed, with each of `words` in it."""
        text = self.err.decode(errors="replace")
        assert self.status == 125, self
        assert self.out == b"", self
        assert "Traceback" not in text, text
        for word in words:
            assert word in text, text
        return text


@dataclass(frozen=True)
class Who:
    """Whom a launcher runs as, and how that account finds program and store."""

    uid: int
    gid: int
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


def myself() -> Who:
    """The account that runs the tests."""
    program = Path(sys.executable).parent / "apppot"
    return Who(os.getuid(), os.getgid(), (str(program),))


class Running:
    """A launcher under way."""

    def __init__(self, process: subprocess.Popen[bytes], marker: str) -> None:
        self.process = process
        self.marker = marker
        self.pid = process.pid

    def wait(self, timeout: float = TIMEOUT) -> int:
        """Its exit status."""
        return self.process.wait(timeout)

    def finish(self, data: bytes | None = None, timeout: float = TIMEOUT) -> Result:
        """Feed `data` to its stdin and collect what it leaves."""
        out, err = self.process.communicate(data, timeout)
        return Result(self.process.returncode, out or b"", err or b"")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def line(self, timeout: float = TIMEOUT) -> bytes:
        """The next line of its stdout: the event that most tests wait for."""
        assert self.process.stdout is not None
        fd, text = self.process.stdout.fileno(), bytearray()
        deadline = time.monotonic() + timeout
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no line within {timeout} s, only {bytes(text)!r}"
            piece = os.read(fd, 1)
            if not piece:
                break
            text += piece
        return bytes(text)

    def family(self) -> set[int]:
        """The processes of this run that live now, the launcher among them."""
        return {self.pid} | processes(self.marker)

    def run_directory(self) -> Path:
        """The run directory, as the launcher's keeper knows it; waits for it."""
        found: list[Path] = []

        def look() -> bool:
            for pid in _children(self.pid):
                words = argv(pid)
                if b"apppot-keeper" in words:
                    found.append(Path(os.fsdecode(words[words.index(b"apppot-keeper") + 1])))
            return bool(found) or self.process.poll() is not None

        assert eventually(look)
        assert found, f"ended with {self.process.returncode}"
        return found[0]

    def kill(self) -> None:
        """End it and all that it started."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        for pid in processes(self.marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Launcher:
    """Starts launchers, each with the same surroundings, and ends what is left of them."""

    def __init__(self, directory: Path, who: Who) -> None:
        self.who = who
        self.work = directory / "work"
        self.state = directory / "state"
        # Short and without odd characters, in memory, as the launcher asks of a place.
        base = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"
        self.run_home = Path(tempfile.mkdtemp(prefix="avm-", dir=base))
        for path in (self.work, self.state):
            path.mkdir()
        for path in (self.run_home, self.work, self.state):
            if os.getuid() == 0:
                os.chown(path, who.uid, who.gid)
        self.log = self.state / "console.log"
        self.marker = self.run_home.name
        self._running: list[Running] = []

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        own = {
            "XDG_RUNTIME_DIR": str(self.run_home),
            "XDG_STATE_HOME": str(self.state),
            "XDG_CONFIG_HOME": str(self.state),
            "APPPOT_LOG": str(self.log),
            # Not what this machine happens to offer: no test depends on that by chance.
            "APPPOT_HYPERVISOR": os.environ.get("VM_TESTS_HYPERVISOR", "uml"),
            "APPPOT_WARM": "off",
        }
        return {**os.environ, **own, **self.who.env, **(extra or {})}

    def start(
        self,
        *words: Word,
        command: str = "run",
        cwd: Word | Path | None = None,
        env: Mapping[str, str] | None = None,
        only_env: Mapping[bytes, bytes] | None = None,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.PIPE,
        wrap: Sequence[str] = (),
        before_exec: Callable[[], object] | None = None,
        new_session: bool = True,
        pass_fds: Sequence[int] = (),
        umask: int = -1,
    ) -> Running:
        """Start `apppot run WORDS`; the caller waits for it or leaves that to the fixture."""
        full: Mapping[str, str] | Mapping[bytes, bytes] = self.environment(env)
        if only_env is not None:
            full = {**{os.fsencode(k): os.fsencode(v) for k, v in full.items()}, **only_env}
        other = os.getuid() != self.who.uid
        process = subprocess.Popen(
            [*wrap, *self.who.command, command, *words],
            cwd=cwd if cwd is not None else self.work,
            env=full,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            bufsize=0,
            preexec_fn=before_exec,
            start_new_session=new_session,
            pass_fds=pass_fds,
            umask=umask,
            user=self.who.uid if other else None,
            group=self.who.gid if other else None,
            extra_groups=[] if other else None,
        )
        # Its name only: a mount shows the path within its own file system.
        running = Running(process, self.marker)
        self._running.append(running)
        return running

    def __call__(self, *words: Word, feed: bytes | None = None, **options: object) -> Result:
        """Run `apppot run WORDS` to its end."""
        if feed is not None:
            options["stdin"] = subprocess.PIPE
        return self.start(*words, **options).finish(feed)  # type: ignore[arg-type]

    def sh(
        self, script: Word, *words: Word, feed: bytes | None = None, **options: object
    ) -> Result:
        """Run a shell script in the guest; its $1… are `words`."""
        return self(IMAGE, "sh", "-c", script, "sh", *words, feed=feed, **options)

    def terminal(self, *words: Word, **options: object) -> Terminal:
        """Start `apppot run WORDS` on a terminal of its own."""
        return Terminal(self, words, **options)  # type: ignore[arg-type]

    def left(self) -> list[str]:
        """What the runs so far have left: processes and run directories."""
        pids = [f"process {pid}: {_words(pid)}" for pid in sorted(processes(self.marker))]
        return pids + [str(path) for path in sorted(self.run_home.iterdir())]

    def await_nothing_left(self, seconds: float = 2.0) -> None:
        """Within `seconds` (the design's promise) nothing of the runs is left."""
        # A loaded test machine must not fail it: what counts is that it goes without help.
        slack = 4.0
        assert eventually(lambda: not self.left(), seconds + slack), self.left()

    def failures(self) -> list[Path]:
        """The directories in which failed starts were kept."""
        home = self.state / "apppot" / "failures"
        return sorted(home.iterdir()) if home.is_dir() else []

    def close(self) -> None:
        for running in self._running:
            running.kill()
        for pid in processes(self.marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.run_home, ignore_errors=True)


class Terminal:
    """A launcher on a pseudo terminal, and what came out of it."""

    def __init__(
        self,
        launcher: Launcher,
        words: Sequence[Word],
        *,
        command: str = "run",
        rows: int = 33,
        columns: int = 101,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
    ) -> None:
        self.master, self._slave = pty.openpty()
        self.name = os.ttyname(self._slave)
        if os.getuid() == 0:
            os.chown(self.name, launcher.who.uid, -1)
        self.resize(rows, columns)
        # Settings that no default has, so that "restored" says something.
        attributes = termios.tcgetattr(self._slave)
        attributes[3] &= ~termios.ECHOK
        attributes[6][termios.VERASE] = b"\x08"
        termios.tcsetattr(self._slave, termios.TCSANOW, attributes)
        self.before = termios.tcgetattr(self._slave)
        self.seen = bytearray()
        slave = self._slave
        self.running = launcher.start(
            *words,
            command=command,
            stdin=slave if stdin is None else stdin,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            wrap=("setsid", "--ctty", "--wait") if stdin is None else (),
            env={"TERM": "vt220", **(env or {})},
            new_session=stdin is not None,
        )
        self._closed = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while not self._closed:
                if select.select([self.master], [], [], 0.05)[0]:
                    self.seen += os.read(self.master, 4096)

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self._slave, (rows, columns))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, text: bytes, timeout: float = TIMEOUT) -> bytes:
        """Wait until `text` has been shown; all that was."""
        ended = self.running.process.poll
        eventually(lambda: text in self.seen or ended() is not None, timeout)
        assert eventually(lambda: text in self.seen, 1), bytes(self.seen)
        return bytes(self.seen)

    def launcher_pid(self) -> int:
        """The launcher itself: setsid(1) executes it in its own place."""
        return self.running.pid

    def is_restored(self) -> bool:
        """Whether the terminal has the settings from before the launcher."""
        return termios.tcgetattr(self._slave) == self.before

    def is_raw(self) -> bool:
        """Whether keys are passed on one by one."""
        return not termios.tcgetattr(self._slave)[3] & termios.ICANON

    def close(self) -> None:
        self._closed = True
        self._reader.join(TIMEOUT)
        for fd in (self._slave, self.master):
            with contextlib.suppress(OSError):
                os.close(fd)


def processes(marker: str) -> set[int]:
    """The processes that have `marker` in an argument or in what they see mounted."""
    found = set()
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        for part in ("cmdline", "mountinfo"):
            with contextlib.suppress(OSError):
                if marker.encode() in Path(f"/proc/{name}/{part}").read_bytes() and _alive(name):
                    if part == "mountinfo" and _same_mounts(name):
                        continue
                    found.add(int(name))
    return found


def kernels(marker: str) -> list[int]:
    """The guest kernels among the processes of `marker`, each with its helper threads."""
    found = []
    for pid in processes(marker):
        if argv(pid)[0].endswith(b"/kernel"):
            found.append(pid)
    return found


def _same_mounts(pid: str) -> bool:
    """Whether the process lives in the tests' own mount namespace."""
    return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")


def _alive(pid: str) -> bool:
    """Whether the process can still do anything: one that ends has given its memory back."""
    return state(int(pid)) not in "ZX" and argv(int(pid)) != [b""]


def state(pid: int) -> str:
    """The letter of the process's state; X when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def _words(pid: int) -> str:
    return b" ".join(argv(pid)).decode(errors="replace")[:200]


def argv(pid: int) -> list[bytes]:
    """The process's arguments; one empty one when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def eventually(condition: Callable[[], bool], seconds: float = TIMEOUT) -> bool:
    """Whether `condition` comes true within `seconds`; for what sends no event."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@contextlib.contextmanager
def open_pipe() -> Iterator[tuple[int, int]]:
    """A pipe whose ends are closed at the end, unless the test did."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for fd in ends:
            with contextlib.suppress(OSError):
                os.close(fd)
