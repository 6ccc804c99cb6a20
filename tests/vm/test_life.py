"""Whatever ends a launcher, nothing of its run stays; whatever ends a guest is told."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher, argv, eventually, kernels, processes

_STREAM = "uname -r; while :; do echo a line of a stream that does not end; done"
CONFINEMENT = ["bubblewrap", "landlock", "off"]


def _gone(directory: Path) -> bool:
    return not directory.exists() and not processes(directory.name)


@pytest.mark.parametrize("confine", CONFINEMENT)
def test_nothing_is_left_of_a_run(apppot: Launcher, confine: str) -> None:
    running = apppot.start("--confine", confine, IMAGE, "sh", "-c", "uname -r; read x", stdin=-1)
    assert running.line().decode().startswith(RELEASE)
    directory = running.run_directory()
    assert directory.is_dir()
    assert kernels(directory.name)
    assert running.finish(b"\n").status == 0
    assert _gone(directory), processes(directory.name)


@pytest.mark.parametrize("whole_group", [False, True], ids=["launcher", "group"])
@pytest.mark.parametrize("confine", CONFINEMENT)
def test_killed_in_mid_stream(apppot: Launcher, whole_group: bool, confine: str) -> None:
    running = apppot.start("--confine", confine, IMAGE, "sh", "-c", _STREAM)
    assert running.line().decode().startswith(RELEASE)
    running.line()
    directory = running.run_directory()
    assert kernels(directory.name)
    (os.killpg if whole_group else os.kill)(running.pid, signal.SIGKILL)
    running.wait()
    assert eventually(lambda: _gone(directory), 6), processes(directory.name)


@pytest.mark.parametrize("confine", CONFINEMENT)
def test_killed_before_hello(apppot: Launcher, confine: str) -> None:
    running = apppot.start("--confine", confine, IMAGE, "sh", "-c", "echo > ran")
    directory = running.run_directory()
    assert eventually(lambda: bool(kernels(directory.name)))
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert eventually(lambda: _gone(directory), 6), processes(directory.name)
    assert not (apppot.work / "ran").exists()


def test_killed_at_any_moment(apppot: Launcher) -> None:
    """From the first sign of a run directory on, in steps of a few milliseconds."""
    for step in range(24):
        running = apppot.start(IMAGE, "true")
        eventually(lambda: bool(list(apppot.run_home.iterdir())))
        signal.sigtimedwait([], step * 0.008)
        running.process.kill()
        running.wait()
    apppot.await_nothing_left()


def test_killed_while_stopped(apppot: Launcher) -> None:
    running = apppot.start(IMAGE, "sh", "-c", _STREAM)
    running.line()
    running.signal(signal.SIGSTOP)
    running.process.kill()
    running.wait()
    apppot.await_nothing_left()


def test_start_sweeps_what_a_crash_left(apppot: Launcher) -> None:
    stale = apppot.run_home / f"apppot-{os.getuid()}-0123456789ab"
    (stale / "net" / "deep").mkdir(parents=True)
    (stale / "lock").touch()
    (stale / "net" / "deep" / "file").write_bytes(b"x")
    (stale / "link").symlink_to(apppot.work)
    (apppot.work / "kept").touch()
    held = apppot.run_home / f"apppot-{os.getuid()}-ba9876543210"
    held.mkdir()
    with open(held / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert apppot(IMAGE, "uname", "-r").ok().decode().startswith(RELEASE)
    assert not stale.exists()
    assert held.exists()
    assert (apppot.work / "kept").exists()


def test_twenty_at_once(apppot: Launcher) -> None:
    """All alive at one moment, on one image: each waits until it has seen all the others."""
    (apppot.work / "here").mkdir()
    script = (
        "uname -r > here/$1.new && mv here/$1.new here/$1; "
        'until [ "$(ls here | grep -vc new)" = 20 ]; do sleep 0.2; done; '
        "echo $1 saw all; cat here/$1"
    )
    runs = [
        apppot.start("--mem", "64M", "--network", "none", IMAGE, "sh", "-c", script, "sh", str(n))
        for n in range(20)
    ]
    results = [running.finish(timeout=90) for running in runs]
    for number, result in enumerate(results):
        lines = result.ok().decode().splitlines()
        assert lines[0] == f"{number} saw all"
        assert lines[1].startswith(RELEASE)
    assert apppot.left() == []


def test_guest_panic(apppot: Launcher) -> None:
    script = "uname -r; sleep 0.1; echo c > /proc/sysrq-trigger; sleep 100"
    result = apppot("-u", "root", IMAGE, "sh", "-c", script)
    assert result.status == 125
    assert result.out.decode().startswith(RELEASE)
    text = result.err.decode()
    assert "sysrq" in text.lower()
    assert "panic" in text
    (kept,) = apppot.failures()
    assert str(kept) in text
    assert "panic" in (kept / "console.log").read_text()
    assert json.loads((kept / "plan.json").read_text())["command"][0] == "sh"
    assert apppot.left() == []


def test_kept_plan_holds_no_secrets(apppot: Launcher) -> None:
    result = apppot(
        "-u", "root", "-e", "TOKEN=swordfish", IMAGE, "sh", "-c", "echo c > /proc/sysrq-trigger"
    )
    assert result.status == 125
    (kept,) = apppot.failures()
    assert "swordfish" not in (kept / "plan.json").read_text()


def test_killed_guest(apppot: Launcher) -> None:
    running = apppot.start(IMAGE, "sh", "-c", "uname -r; exec sleep 100")
    assert running.line().decode().startswith(RELEASE)
    for pid in kernels(apppot.marker):
        os.kill(pid, signal.SIGKILL)
    result = running.finish()
    assert result.status == 125
    assert b"the virtual machine" in result.err
    assert b"apppot-init" in result.err  # the console's last lines
    assert len(apppot.failures()) == 1
    assert apppot.left() == []


def test_hung_guest(apppot: Launcher) -> None:
    """A guest whose agent stands still is noticed within the heartbeat limit."""
    script = (
        "mkdir /sys/fs/cgroup/frozen && echo 1 > /sys/fs/cgroup/frozen/cgroup.procs && uname -r "
        "&& sleep 0.3 && echo 1 > /sys/fs/cgroup/frozen/cgroup.freeze; sleep 100"
    )
    result = apppot("-u", "root", IMAGE, "sh", "-c", script, env={"APPPOT_HEARTBEAT_LIMIT": "3"})
    assert result.status == 125
    assert result.out.decode().startswith(RELEASE)
    assert b"no heartbeat for 3 s" in result.err
    assert len(apppot.failures()) == 1
    assert apppot.left() == []


def test_out_of_memory_is_the_payloads_end(apppot: Launcher) -> None:
    """The guest kernel ends the process that takes all memory; the guest lives on to say so."""
    result = apppot("--mem", "96M", IMAGE, "tail", "/dev/zero")
    assert result.status in (1, 128 + signal.SIGKILL), result
    assert result.out == b""


def test_descriptors_of_the_caller_stay_on_the_host(apppot: Launcher) -> None:
    """A batch system's open files are no way out of the guest's process."""
    secret = apppot.work / "secret"
    secret.write_text("of the host")
    with secret.open("rb") as file:
        running = apppot.start(
            IMAGE, "sh", "-c", "uname -r; read x", stdin=-1, pass_fds=[file.fileno()]
        )
        assert running.line().decode().startswith(RELEASE)
        seen = 0
        for pid in running.family() - {running.pid}:
            if b"apppot-keeper" in argv(pid):
                continue  # the launcher's own, which no guest can reach
            with contextlib.suppress(FileNotFoundError):  # it may end meanwhile
                targets = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
                assert str(secret) not in targets, pid
                seen += 1
        assert seen, "no process of the run was looked at"
        running.finish(b"\n")


def command(pid: int) -> str:
    """The process's name; empty when it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_killed_with_the_network_helper_busy(apppot: Launcher) -> None:
    script = "uname -r; while :; do bash -c ': </dev/tcp/10.0.2.3/53' 2>/dev/null; done"
    running = apppot.start(IMAGE, "sh", "-c", script)
    assert running.line().decode().startswith(RELEASE)
    assert "slirp4netns" in {command(pid) for pid in processes(apppot.marker)}
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    apppot.await_nothing_left()


def test_log_has_the_console(apppot: Launcher, place: Path) -> None:
    apppot("--log", str(place / "console"), IMAGE, "true").ok()
    assert "apppot-init" in (place / "console").read_text()


def test_many_in_a_row_in_threads(apppot: Launcher) -> None:
    """Launchers that start and end at the same moment do not sweep each other's directories."""
    bad: list[object] = []

    def some() -> None:
        for _ in range(6):
            result = apppot("--network", "none", IMAGE, "uname", "-r")
            if not result.out.decode().startswith(RELEASE) or result.err:
                bad.append(result)

    threads = [threading.Thread(target=some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert bad == []
    assert apppot.left() == []
