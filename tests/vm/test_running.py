"""Machines that run: in the background, found by name, joined, watched and stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from apppot.host.channel.control import ExecRequest

from tests.harness.vm import (
    IMAGE,
    RELEASE,
    TIMEOUT,
    Launcher,
    Result,
    Running,
    Terminal,
    eventually,
)

OnTerminal = Callable[..., Terminal]


class Runs:
    """What the tests ask of a launcher's runs."""

    def __init__(self, apppot: Launcher) -> None:
        self.apppot = apppot

    def detach(self, *words: str, name: str = "vm", options: tuple[str, ...] = ()) -> str:
        """Start a run in the background; its id."""
        done = self.apppot("-d", "--name", name, *options, IMAGE, *words)
        return done.ok().decode().strip()

    def exec(self, *words: Any, **options: Any) -> Result:
        return self.apppot(*words, command="exec", **options)

    def start(self, *words: str, **options: Any) -> Running:
        return self.apppot.start(*words, command="exec", **options)

    def guest(self, script: str) -> str:
        """The output of a shell script in the guest, as root."""
        return self.exec("-u", "root", "vm", "sh", "-c", script).ok().decode()

    def do(self, command: str, *words: str, **options: Any) -> Result:
        return self.apppot(*words, command=command, **options)

    def listed(self) -> list[dict[str, Any]]:
        """The runs of this test: others of the same user may go on beside it."""
        rows: list[dict[str, Any]] = json.loads(self.do("ps", "--json").ok())
        return [r for r in rows if str(r["run_directory"]).startswith(str(self.apppot.run_home))]

    def state(self, name: str = "vm") -> str:
        (row,) = [row for row in self.listed() if row["name"] == name]
        return str(row["state"])

    def pid(self) -> int:
        """The launcher in the background."""
        return int(self.listed()[-1]["pid"])


@pytest.fixture
def runs(apppot: Launcher) -> Runs:
    return Runs(apppot)


def test_detached(runs: Runs, apppot: Launcher) -> None:
    began = time.monotonic()
    number = runs.detach("sh", "-c", "uname -r; echo bad >&2; pwd > place; sleep 1; exit 9")
    assert runs.state() == "running"
    assert runs.do("wait", number).status == 9
    assert time.monotonic() - began >= 1
    logs = runs.do("logs", "vm")
    assert logs.out.decode().startswith(RELEASE)
    assert (logs.status, logs.err) == (0, b"bad\n")
    assert (apppot.work / "place").read_text() == "/home/user/job\n"
    assert runs.state() == "ended"
    assert runs.do("wait", "vm", "vm").status == 9
    apppot.await_nothing_left()


def test_detached_knows_nothing_of_the_caller(runs: Runs, apppot: Launcher) -> None:
    """Its stdin is empty, and whoever reads the caller's output sees its end."""
    done = apppot("-d", IMAGE, "sh", "-c", "cat; echo read all; sleep 2", feed=b"words")
    number = done.ok().decode().strip()
    assert len(number) == 12
    assert eventually(lambda: runs.do("logs", number).out == b"read all\n")
    assert runs.do("wait", number[:6]).ok() == b""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["no-such-image", "true"], 125, "no-such-image"),
        ([IMAGE, "no-such-command"], 127, "no-such-command"),
        (["-w", "/no/such/place", IMAGE, "true"], 125, "/no/such/place"),
        (["--kernel", "/bin/false", IMAGE, "true"], 125, "remedy"),
    ],
)
def test_failed_start(
    runs: Runs, apppot: Launcher, words: list[str], status: int, said: str
) -> None:
    done = apppot("-d", "--name", "vm", *words)
    assert (done.status, done.out) == (status, b"")
    assert said in done.err.decode()
    assert runs.do("wait", "vm").status == status
    apppot.await_nothing_left()


def test_names_are_unique(runs: Runs, apppot: Launcher) -> None:
    runs.detach("sleep", "1000")
    apppot("-d", "--name", "vm", IMAGE, "true").failed("the name vm is taken", "remedy")
    apppot("--name", "vm", IMAGE, "true").failed("the name vm is taken")
    apppot("--name", "a/b", IMAGE, "true").failed("cannot name a run")
    runs.do("stop", "--time", "0s", "vm").ok()
    runs.detach("sleep", "1000")
    assert runs.exec("vm", "uname", "-r").ok().decode().startswith(RELEASE)


def test_exec_is_exact(runs: Runs) -> None:
    runs.detach("sleep", "1000")
    words: list[str | bytes] = [
        "",
        " ",
        "a b",
        "*",
        "$HOME",
        "'\"",
        "\\",
        "é€",
        b"\xff\xfe",
        "-x",
        "--",
        "\n",
    ]
    script = 'uname -r; printf "%s\\0" "$@"; echo bad >&2; echo $A; pwd; id -un; exit 42'
    done = runs.exec("-e", "A=b c", "vm", "sh", "-c", script, "sh", *words)
    release, rest = done.out.split(b"\n", 1)
    assert release.decode().startswith(RELEASE)
    sent = b"".join((w if isinstance(w, bytes) else w.encode()) + b"\0" for w in words)
    assert rest == sent + b"b c\n/home/user/job\n" + (b"user\n" if os.getuid() else b"root\n")
    assert (done.status, done.err) == (42, b"bad\n")


def test_exec_how_it_ends(runs: Runs) -> None:
    runs.detach("sleep", "1000")
    assert runs.exec("vm", "sh", "-c", "kill -9 $$").status == 137
    assert runs.exec("vm", "/etc/passwd").status == 126
    missing = runs.exec("vm", "no-such-command")
    assert (missing.status, missing.err[:8]) == (127, b"apppot: ")
    runs.exec("-w", "/no/such", "vm", "true").failed("/no/such")
    runs.exec("-u", "nobody-there", "vm", "true").failed("no account 'nobody-there'")
    assert runs.exec("vm", "true").ok() == b""
    assert runs.state() == "running"


def test_exec_binary_both_ways(runs: Runs) -> None:
    runs.detach("sleep", "1000")
    data = random.Random(7).randbytes(9_000_001)
    assert runs.exec("vm", "cat", feed=data).ok() == data
    digest = hashlib.sha256(data).hexdigest()
    assert runs.exec("vm", "sha256sum", feed=data).ok().decode().split()[0] == digest
    for size in (0, 1, 31, 32, 33, 96, 4096):
        assert runs.exec("vm", "cat", feed=data[:size]).ok() == data[:size]
    assert runs.exec("-n", "vm", "cat", feed=b"words").ok() == b""


def test_exec_reader_that_goes(runs: Runs) -> None:
    runs.detach("sleep", "1000")
    running = runs.start("vm", "yes")
    assert running.line() == b"y\n"
    assert running.process.stdout is not None
    running.process.stdout.close()
    assert running.wait() == 141


def test_exec_as_root_and_user(runs: Runs) -> None:
    runs.detach("sleep", "1000", options=("-u", "user"))
    assert runs.exec("-u", "root", "vm", "id", "-u").ok() == b"0\n"
    assert runs.exec("-u", "daemon", "vm", "id", "-un").ok() == b"daemon\n"
    assert runs.exec("-w", "/tmp", "vm", "pwd").ok() == b"/tmp\n"


def test_exec_as_an_ordinary_user(user: Launcher) -> None:
    runs = Runs(user)
    runs.detach("sleep", "1000")
    told = runs.exec("vm", "sh", "-c", "uname -r; id -u; umask; echo x > made").ok().decode()
    assert told.splitlines()[1] == str(user.who.uid)
    assert (user.work / "made").stat().st_uid == user.who.uid
    assert runs.exec("-u", "root", "vm", "id", "-u").ok() == b"0\n"


def test_exec_sees_the_mounts_of_the_payload(runs: Runs) -> None:
    script = "mkdir /mnt/a; mount -t tmpfs none /mnt/a; echo inside > /mnt/a/x; sleep 1000"
    runs.detach("sh", "-c", script, options=("-u", "root"))
    assert eventually(lambda: runs.exec("vm", "cat", "/mnt/a/x").out == b"inside\n", 10)
    runs.guest("echo more > /mnt/a/y; mount -t tmpfs none /opt; echo z > /opt/z")
    assert runs.guest("cat /mnt/a/y /opt/z; ls /run/apppot 2>&1 | head -1").startswith("more\nz\n")


def test_exec_on_a_terminal(runs: Runs, on_terminal: OnTerminal) -> None:
    runs.detach("sleep", "1000")
    script = "trap 'stty size; resized=1' WINCH; tty; stty size; echo T=$TERM; "
    script += "until [ $resized ]; do sleep 0.1; done; read x; echo got $x; exit 3"
    shown = on_terminal("vm", "bash", "-c", script, command="exec")
    shown.expect(b"T=vt220\r\n")
    assert b"/dev/pts/" in shown.seen
    assert b"33 101\r\n" in shown.seen
    assert shown.is_raw()
    shown.resize(44, 77)
    shown.expect(b"44 77\r\n")
    shown.type(b"words\r")
    shown.expect(b"got words")
    assert shown.running.wait() == 3
    assert shown.is_restored()


def test_exec_terminal_keys(runs: Runs, on_terminal: OnTerminal) -> None:
    runs.detach("sleep", "1000")
    script = "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.1; done"
    shown = on_terminal("vm", "sh", "-c", script, command="exec")
    shown.expect(b"ready")
    shown.type(b"\x03")
    shown.expect(b"interrupted")
    assert shown.running.wait() == 5
    assert shown.is_restored()


def test_exec_login_shell(runs: Runs, on_terminal: OnTerminal) -> None:
    runs.detach("sleep", "1000")
    shown = on_terminal("vm", command="exec")
    shown.type(b"echo in $(uname -r) $((40 + 2)); exit 6\r")
    shown.expect(f"in {RELEASE}".encode())
    assert shown.running.wait() == 6


def test_exec_signals(runs: Runs) -> None:
    runs.detach("sleep", "1000")
    script = "trap 'echo got it; exit 8' TERM; echo ready; while :; do sleep 0.1; done"
    running = runs.start("vm", "sh", "-c", script)
    assert running.line() == b"ready\n"
    running.signal(signal.SIGTERM)
    assert running.line() == b"got it\n"
    assert running.wait() == 8


def test_many_at_once(runs: Runs) -> None:
    runs.detach("sleep", "1000")
    data = [random.Random(n).randbytes(200_000 + n) for n in range(12)]
    running = [runs.start("vm", "sh", "-c", f"cat; exit {n}", stdin=-1) for n in range(12)]
    done: list[Result] = [one.finish(data[n]) for n, one in enumerate(running)]
    assert [(one.status, one.err) for one in done] == [(n, b"") for n in range(12)]
    assert [one.out for one in done] == data
    assert runs.guest("ps -e -o comm= | grep -c '^cat$' || true") == "0\n"


def test_slow_client_stalls_nobody(runs: Runs) -> None:
    """Several at once read nothing; heartbeat, payload and others go on."""
    env = {"APPPOT_HEARTBEAT_LIMIT": "3s"}
    script = "sleep 5; seq 200000; exit 4"
    done = runs.apppot("-d", "--name", "vm", IMAGE, "sh", "-c", script, env=env)
    assert done.status == 0
    slow = [runs.start("vm", "cat", "/dev/zero") for _ in range(3)]
    for one in slow:
        assert one.process.stdout is not None
        assert one.process.stdout.read(1) == b"\0"
    assert runs.exec("vm", "uname", "-r").ok().decode().startswith(RELEASE)
    assert runs.do("wait", "vm").status == 4
    assert runs.do("logs", "vm").out == b"".join(b"%d\n" % n for n in range(1, 200001))
    runs.apppot.await_nothing_left()


def test_client_that_is_killed(runs: Runs) -> None:
    runs.detach("sleep", "1000")
    running = [runs.start("vm", "sleep", "4321"), runs.start("vm", "cat", stdin=-1)]
    count = "ps -e -o args= | grep -c -e '^[s]leep 4321' -e '^[c]at$' || true"
    assert eventually(lambda: runs.guest(count) == "2\n", 10)
    for one in running:
        one.process.kill()
    assert eventually(lambda: runs.guest(count) == "0\n", 10)
    assert runs.state() == "running"


def test_what_exec_leaves_ends_with_the_payload(runs: Runs) -> None:
    runs.detach("sleep", "2")
    assert runs.exec("vm", "sh", "-c", "setsid sleep 1000 & echo done").ok() == b"done\n"
    assert "sleep 1000" in runs.guest("ps -e -o args=")
    joined = runs.start("vm", "sleep", "1000")
    assert runs.do("wait", "vm").status == 0
    assert joined.wait() == 128 + signal.SIGTERM
    runs.apppot.await_nothing_left()


def test_exec_in_a_foreground_run(runs: Runs, apppot: Launcher) -> None:
    running = apppot.start(IMAGE, "sh", "-c", "echo ready; read x; exit 3", stdin=-1)
    assert running.line() == b"ready\n"
    (row,) = runs.listed()
    assert (row["state"], row["detached"], row["image"]) == ("running", False, IMAGE)
    assert runs.exec(row["id"], "uname", "-r").ok().decode().startswith(RELEASE)
    runs.do("logs", row["id"]).failed("keeps no logs", "remedy")
    assert running.finish(b"\n").status == 3
    assert runs.listed() == []


def test_exec_on_a_run_that_ended(runs: Runs) -> None:
    runs.detach("true")
    assert runs.do("wait", "vm").status == 0
    runs.exec("vm", "true").failed("run vm has ended with status 0", "remedy")
    runs.exec("no-such-run", "true").failed("there is no run no-such-run")
    runs.do("wait", "no-such-run").failed("there is no run")


def test_launcher_that_is_killed(runs: Runs, apppot: Launcher) -> None:
    runs.detach("sh", "-c", "echo words; sleep 1000")
    joined = runs.start("vm", "sleep", "1000")
    count = "ps -e -o args= | grep -c '^[s]leep 1000' || true"
    assert eventually(lambda: runs.guest(count) == "2\n", 10)
    os.kill(runs.pid(), signal.SIGKILL)
    apppot.await_nothing_left()
    assert runs.state() == "lost"
    joined.finish().failed("its launcher is gone")
    runs.do("wait", "vm").failed("run vm is lost")
    runs.exec("vm", "true").failed("run vm is lost")
    assert runs.do("logs", "-f", "vm").ok() == b"words\n"
    runs.do("stop", "vm").ok()
    assert runs.detach("true") != ""  # the name is free again


def test_stop(runs: Runs, apppot: Launcher) -> None:
    runs.detach("sh", "-c", "trap 'echo ending; exit 5' TERM; echo up; while :; do sleep 0.1; done")
    assert eventually(lambda: runs.do("logs", "vm").out == b"up\n", 10)
    runs.do("stop", "vm").ok()
    assert runs.do("wait", "vm").status == 5
    assert runs.do("logs", "vm").out == b"up\nending\n"
    apppot.await_nothing_left()


def test_stop_of_one_that_will_not(runs: Runs, apppot: Launcher) -> None:
    runs.detach("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done", name="a")
    runs.detach("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done", name="b")
    assert eventually(lambda: runs.do("logs", "b").out == b"up\n", 10)
    began = time.monotonic()
    runs.do("stop", "--time", "2s", "a", "b").ok()
    assert 2 <= time.monotonic() - began < 10
    assert runs.do("wait", "a", "b").status == 137
    apppot.await_nothing_left()


def test_follow(runs: Runs) -> None:
    runs.detach("sh", "-c", "for n in 1 2 3; do echo $n; sleep 0.5; done; echo end >&2")
    follower = runs.apppot.start("-f", "vm", command="logs")
    assert follower.line() == b"1\n"
    assert runs.state() == "running"
    done = follower.finish()
    assert (done.status, done.out, done.err) == (0, b"2\n3\n", b"end\n")
    assert runs.state() == "ended"


def test_the_socket_is_the_users_own(runs: Runs) -> None:
    runs.detach("sleep", "1000")
    (row,) = runs.listed()
    assert Path(row["run_directory"]).stat().st_mode & 0o077 == 0
    assert (runs.apppot.state / "apppot" / "runs").stat().st_mode & 0o077 == 0


def test_clients_that_talk_nonsense(runs: Runs) -> None:
    import socket

    runs.detach("sleep", "1000")
    (row,) = runs.listed()
    place = os.path.join(row["run_directory"], "control")
    reader, writer = os.pipe()
    huge, deep = b'{"stop": 1%s}' % (b"0" * 400), b"[" * 4000
    orders = (b"", b"x", b"[]", b"{}", b'{"exec": 1}', b'{"stop": "x"}', b'{"signal": -1}')
    for data in (*orders, huge, deep):
        for fds in ([], [0], [0, 1, 2, reader], [0, 1, 2, 0, 1, 2]):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                client.connect(place)
                socket.send_fds(client, [data], fds)
    for fd in (reader, writer):
        os.close(fd)
    assert runs.exec("vm", "uname", "-r").ok().decode().startswith(RELEASE)
    table = f"/proc/{row['pid']}/fd"
    before = len(os.listdir(table))
    for _ in range(5):
        assert runs.exec("vm", "echo", "x").ok() == b"x\n"
    assert len(os.listdir(table)) <= before
    assert os.listdir(os.path.join(row["run_directory"], "exchange")) == []


@pytest.mark.parametrize(
    "fields",
    [{"tty": True, "rows": "x"}, {"rows": -1}, {"user": [1]}, {"user": "99999999999999999999"}],
)
def test_requests_that_no_guest_can_act_on(runs: Runs, fields: dict[str, Any]) -> None:
    """What one client asks is refused; the payload does not notice."""
    import socket

    runs.detach("sleep", "1000")
    (row,) = runs.listed()
    request = json.loads(ExecRequest((b"true",), {}).dump())
    with tempfile.TemporaryFile() as file, open(os.devnull, "r+b") as nothing:
        file.write(json.dumps({**request, **fields}).encode())
        file.flush()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.settimeout(TIMEOUT)
            client.connect(os.path.join(row["run_directory"], "control"))
            fds = [nothing.fileno()] * 3 + [file.fileno()]
            socket.send_fds(client, [b'{"exec": 1}'], fds)
            assert b"bad request" in client.recv(4096)
    assert runs.exec("vm", "uname", "-r").ok().decode().startswith(RELEASE)
    assert runs.state() == "running"


def test_interrupted_while_it_starts(runs: Runs, apppot: Launcher) -> None:
    starting = apppot.start("-d", "--name", "vm", IMAGE, "sleep", "1000")
    assert eventually(lambda: bool(list(apppot.run_home.iterdir())))
    starting.signal(signal.SIGINT)
    status = starting.wait()
    if status:  # else it had started before the signal came
        assert status == 128 + signal.SIGINT
        apppot.await_nothing_left()


def test_ps_for_people(runs: Runs) -> None:
    runs.detach("sh", "-c", "exit 3", name="first")
    runs.do("wait", "first")
    runs.detach("sleep", "1000", name="second")
    lines = runs.do("ps").ok().decode().splitlines()
    assert lines[0].split() == ["NAME", "IMAGE", "STATE", "CREATED", "COMMAND"]
    own = [line for line in lines[1:] if line.split()[0] in ("first", "second")]
    assert [line.split()[:3] for line in own] == [
        ["first", IMAGE, "ended"],
        ["second", IMAGE, "running"],
    ]
