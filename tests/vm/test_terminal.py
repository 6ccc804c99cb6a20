"""A payload on a terminal: given when it should be, and the caller's restored whatever happens."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher, Terminal, eventually, kernels, myself

OnTerminal = Callable[..., Terminal]
_READY = "uname -r; stty size; echo ready; exec cat"


def test_automatic(on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "sh", "-c", "tty; uname -r; stty size; echo T=$TERM")
    assert shown.running.wait() == 0
    text = shown.expect(b"T=vt220\r\n").decode()
    assert text.startswith("/dev/pts/")
    assert f"\r\n{RELEASE}" in text
    assert "\r\n33 101\r\n" in text
    assert shown.is_restored()


def test_not_when_stdout_is_none(apppot: Launcher, on_terminal: OnTerminal) -> None:
    read, write = os.pipe()
    shown = on_terminal(IMAGE, "sh", "-c", "tty; uname -r; [ -t 1 ] || echo none", stdout=write)
    os.close(write)
    with os.fdopen(read, "rb") as out:
        lines = out.read().decode().splitlines()
    assert shown.running.wait() == 0
    assert (lines[0], lines[2]) == ("not a tty", "none")
    assert lines[1].startswith(RELEASE)
    assert shown.is_restored()


def test_not_with_capital_t(on_terminal: OnTerminal) -> None:
    shown = on_terminal("-T", IMAGE, "sh", "-c", "[ -t 1 ] || uname -r")
    assert shown.running.wait() == 0
    shown.expect(RELEASE.encode())


def test_asked_for_without_one(apppot: Launcher) -> None:
    result = apppot("-t", IMAGE, "sh", "-c", "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && uname -r")
    assert result.ok().decode().startswith(RELEASE)


def test_asked_for_with_input_from_a_pipe(apppot: Launcher) -> None:
    result = apppot("-t", IMAGE, "sh", "-c", "stty -echo; read x; echo got $x; cat", feed=b"line\n")
    assert (result.status, result.err) == (0, b"")
    assert b"got line\r\n" in result.out


def test_resize(on_terminal: OnTerminal) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    shown = on_terminal(IMAGE, "sh", "-c", script)
    shown.expect(b"ready")
    shown.resize(44, 133)
    os.kill(shown.launcher_pid(), signal.SIGWINCH)
    shown.expect(b"44 133")


def test_interrupt_key(on_terminal: OnTerminal) -> None:
    """^C goes to the payload as a key of its terminal; the launcher lives on for its status."""
    script = "trap 'echo interrupted; exit 42' INT; echo ready; while :; do sleep 0.05; done"
    shown = on_terminal(IMAGE, "sh", "-c", script)
    shown.expect(b"ready")
    assert shown.is_raw()
    shown.type(b"\x03")
    shown.expect(b"interrupted")
    assert shown.running.wait() == 42
    assert shown.is_restored()


def test_end_of_file_key(on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "sh", "-c", _READY)
    shown.expect(b"ready")
    shown.type(b"some words\r")
    assert eventually(lambda: shown.seen.count(b"some words\r\n") == 2)  # the echo and cat's
    shown.type(b"\x04")
    assert shown.running.wait() == 0
    assert shown.is_restored()


def test_job_control_in_the_guest(on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "bash", "--norc", "-i", env={"PS1": "prompt-%"})
    shown.expect(b"prompt-%")
    shown.type(b"sh -c 'echo started; exec sleep 1000'\r")
    assert eventually(lambda: shown.seen.count(b"started") == 2)  # the echo and sh's
    shown.type(b"\x1a")
    shown.expect(b"Stopped")
    shown.type(b"\rkill %1; uname -r; exit 5\r")
    assert shown.running.wait() == 5
    assert f"\r{RELEASE}" in shown.seen.decode(errors="replace").replace("\n", "")


def test_restored_after_term(on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "sh", "-c", _READY)
    shown.expect(b"ready")
    assert shown.is_raw()
    os.kill(shown.launcher_pid(), signal.SIGTERM)
    assert shown.running.wait() == 128 + signal.SIGTERM
    assert shown.is_restored()


def test_restored_after_the_guest_failed(apppot: Launcher, on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "sh", "-c", _READY)
    shown.expect(b"ready")
    for pid in kernels(apppot.marker):
        os.kill(pid, signal.SIGKILL)
    assert shown.running.wait() == 125
    assert shown.is_restored()
    shown.expect(b"apppot: the virtual machine")


def test_restored_after_kill(apppot: Launcher, on_terminal: OnTerminal) -> None:
    """The launcher cannot; its keeper does."""
    shown = on_terminal(IMAGE, "sh", "-c", _READY)
    shown.expect(b"ready")
    assert shown.is_raw()
    os.kill(shown.launcher_pid(), signal.SIGKILL)
    assert eventually(shown.is_restored, 10)
    apppot.await_nothing_left()


def test_restored_after_kill_of_the_group(apppot: Launcher, on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "sh", "-c", _READY)
    shown.expect(b"ready")
    os.killpg(os.getpgid(shown.launcher_pid()), signal.SIGKILL)
    assert eventually(shown.is_restored, 10)
    apppot.await_nothing_left()


def test_hangup_of_the_terminal(apppot: Launcher, on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "sh", "-c", "echo ready; exec sleep 1000")
    shown.expect(b"ready")
    shown.close()
    assert shown.running.wait() in (128 + signal.SIGHUP, -signal.SIGHUP, 129)
    apppot.await_nothing_left()


def test_console(apppot: Launcher, on_terminal: OnTerminal) -> None:
    """A login shell; leaving it powers off."""
    shown = on_terminal(IMAGE, command="console")
    shown.type(b"echo in $(uname -r) $((40 + 2))\r")
    shown.expect(f"in {RELEASE}".encode())
    shown.expect(b" 42\r\n")
    shown.type(b"exit 6\r")
    assert shown.running.wait() == 6
    assert shown.is_restored()
    assert apppot.left() == []


def test_keys_before_the_guest_is_up_are_not_lost(on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "sh", "-c", "read x; echo got $x; uname -r")
    shown.type(b"typed early\r")
    shown.expect(b"got typed early")
    assert shown.running.wait() == 0


@pytest.mark.parametrize("keys", [b"\x11\x13\x1c\x00\xff\x7f"])
def test_raw_keys(on_terminal: OnTerminal, keys: bytes) -> None:
    script = f"stty raw -echo; echo ready; head -c {len(keys)} | od -An -tx1; stty sane; uname -r"
    shown = on_terminal(IMAGE, "sh", "-c", script)
    shown.expect(b"ready")
    shown.type(keys)
    shown.expect(keys.hex(" ").encode())
    assert shown.running.wait() == 0


def test_large_output_on_a_terminal(on_terminal: OnTerminal) -> None:
    shown = on_terminal(IMAGE, "sh", "-c", "seq 20000; uname -r")
    assert shown.running.wait() == 0
    shown.expect(RELEASE.encode())
    lines = bytes(shown.seen).decode().split("\r\n")
    assert lines[:20000] == [str(n) for n in range(1, 20001)]


@pytest.fixture
def shell(apppot: Launcher, on_terminal: OnTerminal) -> Terminal:
    """An interactive shell of the host, with job control, in which the launcher is a command."""
    apppot.who = replace(apppot.who, command=("bash", "--norc", "--noprofile", "-i"))
    program = shlex.join([*myself().command, "run", "--network", "none", IMAGE])
    terminal = on_terminal(command="-i", env={"PS1": "host> ", "RUN": program})
    terminal.expect(b"host> ")
    return terminal


def test_suspend_and_continue(shell: Terminal) -> None:
    """Ctrl-Z stops guest and launcher, `fg` continues both, with the terminal each time right."""
    loop = "uname -r; i=0; while read -r line; do i=$((i+1)); echo got$i:$line; done"
    shell.type(b"$RUN sh -c '%s'\n" % loop.encode())
    shell.expect(RELEASE.encode())
    shell.type(b"one\n")
    shell.expect(b"got1:one")
    shell.type(b"\x1a")
    shell.expect(b"Stopped")
    shell.type(b"echo $((6*7))here\n")
    shell.expect(b"42here")
    shell.type(b"fg\n")
    shell.type(b"two\n")
    shell.expect(b"got2:two")
    # What is typed before the prompt is there again, the key itself throws away.
    prompts = shell.seen.count(b"host> ")
    shell.type(b"\x03")
    assert eventually(lambda: shell.seen.count(b"host> ") > prompts)
    shell.type(b"echo status $?\n")
    shell.expect(b"status 130")


def test_in_the_background_the_terminal_stays_the_shells(shell: Terminal) -> None:
    shell.type(b"$RUN sh -c 'uname -r; tty; echo do''ne' &\n")
    shown = shell.expect(b"done")
    assert RELEASE.encode() in shown
    assert b"not a tty" in shown
    assert b"Stopped" not in shown
