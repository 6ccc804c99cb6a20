"""Signals for the launcher reach the payload, and stopping it stops both."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher, eventually, kernels, state

_TRAP = """
trap 'echo got {name}; exit {status}' {name}
uname -r
while :; do sleep 0.05; done
"""


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "XCPU", "ALRM"])
def test_signal_reaches_the_payload(apppot: Launcher, name: str) -> None:
    running = apppot.start(IMAGE, "sh", "-c", _TRAP.format(name=name, status=40))
    assert running.line().decode().startswith(RELEASE)
    running.signal(getattr(signal, f"SIG{name}"))
    result = running.finish()
    assert (result.status, result.out) == (40, f"got {name}\n".encode())


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1"])
def test_signal_without_a_trap(apppot: Launcher, name: str) -> None:
    running = apppot.start(IMAGE, "sh", "-c", "uname -r; exec sleep 100")
    assert running.line().decode().startswith(RELEASE)
    number = getattr(signal, f"SIG{name}")
    running.signal(number)
    assert running.finish().status == 128 + number


def test_signal_reaches_the_process_group(apppot: Launcher) -> None:
    """A pipeline's other members as well, as from a terminal or a batch system."""
    script = (
        "(trap 'echo child; exit' USR1; while :; do sleep 0.05; done) & "
        "trap 'wait; echo parent; exit 0' USR1; sleep 0.2; uname -r; while :; do sleep 0.05; done"
    )
    running = apppot.start(IMAGE, "sh", "-c", script)
    assert running.line().decode().startswith(RELEASE)
    running.signal(signal.SIGUSR1)
    result = running.finish()
    assert (result.status, result.out) == (0, b"child\nparent\n")


def test_many_signals(apppot: Launcher) -> None:
    script = "n=0; trap 'n=$((n+1)); echo $n' USR1; uname -r; while :; do sleep 0.02; done"
    running = apppot.start(IMAGE, "sh", "-c", script)
    assert running.line().decode().startswith(RELEASE)
    for count in range(1, 11):
        running.signal(signal.SIGUSR1)
        assert running.line() == b"%d\n" % count
    running.signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    apppot.await_nothing_left()


def test_ignored_signal_stays_ignored(apppot: Launcher) -> None:
    """`nohup apppot run …`"""
    running = apppot.start(
        IMAGE,
        "sh",
        "-c",
        "uname -r; read line; echo $line",
        stdin=-1,
        before_exec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert running.line().decode().startswith(RELEASE)
    running.signal(signal.SIGHUP)
    assert running.finish(b"still here\n").ok() == b"still here\n"


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_signal_before_the_guest_is_up(apppot: Launcher, name: str) -> None:
    """Ends the launcher with 128+n, as the shell sees it, and leaves nothing."""
    running = apppot.start(IMAGE, "sh", "-c", "echo ran > ran")
    assert eventually(lambda: any(apppot.run_home.iterdir()))
    number = getattr(signal, f"SIG{name}")
    running.signal(number)
    result = running.finish()
    assert result.status in (128 + number, -number), result
    assert b"Traceback" not in result.err
    apppot.await_nothing_left()


def test_signal_right_after_the_first_instruction(apppot: Launcher) -> None:
    """Whether or not the launcher has read by then that the payload has started.

    It is stopped for a moment at ever later points of a start: at some of them it has said GO,
    and the payload runs behind its back.
    """
    script = "trap 'echo got; exit 7' USR1; echo up > up; while :; do sleep 0.05; done"
    up, unheard = apppot.work / "up", 0
    for attempt in range(30):
        running = apppot.start(IMAGE, "sh", "-c", script)
        time.sleep(0.08 + 0.012 * attempt)
        running.signal(signal.SIGSTOP)
        eventually(up.exists, 0.4)
        unheard += up.exists()
        if up.exists():
            running.signal(signal.SIGUSR1)
        running.signal(signal.SIGCONT)
        assert eventually(up.exists)
        running.signal(signal.SIGUSR1)
        result = running.finish()
        assert (result.status, result.out) == (7, b"got\n"), (attempt, result)
        up.unlink()
    assert unheard


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_signals_after_the_end_change_nothing(apppot: Launcher, name: str) -> None:
    """The payload's status is known then; a process that has ended does not feel a signal."""
    script = f"trap 'exit 7' {name}; uname -r > up; while :; do sleep 0.05; done"
    up = apppot.work / "up"
    for _ in range(5):
        running = apppot.start(IMAGE, "sh", "-c", script)
        assert eventually(lambda: up.exists() and up.read_text().startswith(RELEASE))
        while running.process.poll() is None:
            running.signal(getattr(signal, f"SIG{name}"))
            time.sleep(0.0005)  # not a wait: signals go on coming, and the processor is not ours
        result = running.finish()
        assert (result.status, result.out) == (7, b""), result
        up.unlink()


def test_signal_while_the_guest_boots(apppot: Launcher) -> None:
    """The launcher waits for HELLO, which a stopped machine does not say."""
    running = apppot.start(IMAGE, "sh", "-c", "echo ran > ran")
    stopped = _stop_kernels(apppot)
    running.signal(signal.SIGTERM)
    result = running.finish()
    assert result.status in (128 + signal.SIGTERM, -signal.SIGTERM), result
    assert b"Traceback" not in result.err
    assert not (apppot.work / "ran").exists()
    assert stopped
    apppot.await_nothing_left()


def _stop_kernels(apppot: Launcher) -> list[int]:
    """Stop the machines that boot now, before they can say HELLO; their processes."""
    assert eventually(lambda: bool(kernels(apppot.marker)))
    found = kernels(apppot.marker)
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    return found


_COUNTER = "uname -r; n=0; while :; do n=$((n+1)); echo $n > count; sleep 0.02; done"


def test_stop_and_continue(apppot: Launcher) -> None:
    """SIGTSTP (Ctrl-Z) stops launcher and payload, SIGCONT (fg) continues both."""
    running = apppot.start(IMAGE, "sh", "-c", _COUNTER)
    assert running.line().decode().startswith(RELEASE)
    count = apppot.work / "count"
    assert eventually(lambda: count.exists() and count.read_text() != "")
    running.signal(signal.SIGTSTP)
    assert eventually(lambda: state(running.pid) == "T")
    stood = _settled(count)
    time.sleep(0.5)  # twenty times the counter's step
    assert count.read_text() == stood
    running.signal(signal.SIGCONT)
    assert eventually(lambda: count.read_text() not in ("", stood))
    assert state(running.pid) != "T"
    running.signal(signal.SIGTERM)
    assert running.finish().status == 128 + signal.SIGTERM


def _settled(count: Path) -> str:
    """The counter's value once the payload has got its stop signal too."""
    values = [""]

    def same() -> bool:
        time.sleep(0.2)
        values.append(count.read_text())
        return values[-1] == values[-2] != ""

    assert eventually(same)
    return values[-1]


def test_stopped_machine_is_not_taken_for_hung(apppot: Launcher) -> None:
    """Stopping everything from outside, as batch systems do, is no failure of the guest."""
    running = apppot.start(IMAGE, "sh", "-c", _COUNTER, env={"APPPOT_HEARTBEAT_LIMIT": "3"})
    assert running.line().decode().startswith(RELEASE)
    assert eventually((apppot.work / "count").exists)
    others = running.family() - {running.pid}
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(5)  # more than the limit
    assert running.process.poll() is None
    for pid in others:
        os.kill(pid, signal.SIGCONT)
    stood = (apppot.work / "count").read_text()
    assert eventually(lambda: (apppot.work / "count").read_text() not in ("", stood))
    running.signal(signal.SIGTERM)
    assert running.finish().status == 128 + signal.SIGTERM


def test_stopped_launcher_does_not_take_the_guest_for_hung(apppot: Launcher) -> None:
    running = apppot.start(
        IMAGE, "sh", "-c", "uname -r; sleep 7; uname -r", env={"APPPOT_HEARTBEAT_LIMIT": "3"}
    )
    running.line()
    running.signal(signal.SIGSTOP)
    time.sleep(5)  # more than the limit
    running.signal(signal.SIGCONT)
    assert running.finish().ok().decode().startswith(RELEASE)
