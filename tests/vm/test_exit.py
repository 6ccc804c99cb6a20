"""The exit status of a payload is the launcher's, and what it wrote before is there."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher


@pytest.mark.parametrize("status", [0, 1, 2, 77, 124, 125, 126, 127, 128, 255])
def test_own_status(apppot: Launcher, status: int) -> None:
    result = apppot.sh(f"uname -r; exit {status}")
    assert result.status == status
    assert result.out.decode().startswith(RELEASE)
    assert result.err == b""


@pytest.mark.parametrize("number", [1, 2, 3, 6, 8, 9, 11, 13, 15, 24, 34])
def test_killed_by_a_signal(apppot: Launcher, number: int) -> None:
    result = apppot.sh(f"uname -r; kill -{number} $$; sleep 20")
    assert (result.status, result.err) == (128 + number, b"")
    assert result.out.decode().startswith(RELEASE)


def test_command_not_found(apppot: Launcher) -> None:
    result = apppot(IMAGE, "no-such-program-x")
    assert (result.status, result.out) == (127, b"")
    assert b"no-such-program-x: No such file or directory" in result.err


def test_path_not_found(apppot: Launcher) -> None:
    assert apppot(IMAGE, "/no/such/program").status == 127


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc", "./not-executable"])
def test_not_executable(apppot: Launcher, path: str) -> None:
    (apppot.work / "not-executable").write_text("#!/bin/sh\necho no\n")
    result = apppot(IMAGE, path)
    assert (result.status, result.out) == (126, b"")
    assert b"Permission denied" in result.err


def test_foreign_binary(apppot: Launcher) -> None:
    program = apppot.work / "foreign"
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(200))
    program.chmod(0o755)
    assert apppot(IMAGE, "./foreign").status == 126


def test_script_without_first_line(apppot: Launcher) -> None:
    """Given to the shell, as execvp(3) does."""
    script = apppot.work / "script"
    script.write_bytes(b'uname -r\nprintf "%s|" "$@"\nexit 5\n')
    script.chmod(0o755)
    result = apppot(IMAGE, "./script", "a b", b"\xff")
    assert result.status == 5
    assert re.fullmatch(rb"7\.2\S*\na b\|\xff\|", result.out)


def test_script_with_missing_interpreter(apppot: Launcher) -> None:
    script = apppot.work / "script"
    script.write_bytes(b"#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert apppot(IMAGE, "./script").status == 127


def test_leftover_processes_are_ended(apppot: Launcher) -> None:
    """They get SIGTERM and a moment; what they wrote before is there, the status is the main's."""
    script = (
        "(trap 'uname -r > ended; exit' TERM; echo ready; while :; do sleep 0.05; done) & "
        "while ! [ -e ready ]; do sleep 0.01; [ -d /proc/$! ] && : > ready; done; sleep 0.3; exit 3"
    )
    result = apppot.sh(script)
    assert (result.status, result.out) == (3, b"ready\n")
    assert (apppot.work / "ended").read_text().startswith(RELEASE)


def test_leftover_that_ignores_sigterm(apppot: Launcher) -> None:
    result = apppot.sh("(trap '' TERM; uname -r; sleep 1000) & sleep 0.3; exit 4")
    assert result.status == 4
    assert result.out.decode().startswith(RELEASE)


def test_leftover_in_a_session_of_its_own(apppot: Launcher) -> None:
    result = apppot.sh("setsid sleep 1000 >/dev/null 2>&1 </dev/null & uname -r; exit 0")
    assert result.ok().decode().startswith(RELEASE)


def test_output_before_a_leftover_is_drained(apppot: Launcher) -> None:
    """A slow reader gets all of it, also when the leftover's time is over."""
    running = apppot.start(IMAGE, "sh", "-c", "sleep 1000 & head -c 3000000 /dev/zero; exit 6")
    assert running.process.stdout is not None
    first = running.process.stdout.read(1)
    # Longer than a leftover has: the guest has to wait for this reader with nothing left to end.
    signal.sigtimedwait([], 3)
    result = running.finish()
    assert (result.status, len(first + result.out), result.err) == (6, 3_000_000, b"")


def test_time_limit(apppot: Launcher) -> None:
    result = apppot("--time", "1", IMAGE, "sh", "-c", "uname -r; exec sleep 100")
    assert result.status == 124
    assert result.out.decode().startswith(RELEASE)
    assert b"time limit" in result.err


def test_time_limit_whatever_the_payload_returns(apppot: Launcher) -> None:
    """One that takes its chance to end well is told apart from one that was done in time."""
    script = "trap 'echo saved; exit 0' TERM; uname -r; while :; do sleep 0.05; done"
    result = apppot("--time", "1", IMAGE, "sh", "-c", script)
    assert result.status == 124
    assert result.out.endswith(b"saved\n")


def test_time_limit_of_a_payload_that_ignores_it(apppot: Launcher) -> None:
    script = "trap '' TERM; uname -r; while :; do sleep 0.2; done"
    result = apppot("--time", "1", IMAGE, "sh", "-c", script)
    assert result.status == 124
    assert result.out.decode().startswith(RELEASE)


def test_time_limit_of_a_stopped_payload(apppot: Launcher) -> None:
    result = apppot("--time", "1", IMAGE, "sh", "-c", "uname -r; kill -STOP $$")
    assert result.status == 124


def test_in_time(apppot: Launcher) -> None:
    assert apppot("--time", "1h", IMAGE, "sh", "-c", "exit 9").status == 9


def test_zombies_are_collected(apppot: Launcher) -> None:
    script = (
        "for n in $(seq 50); do (sleep 0.01 &) ; done; sleep 0.5;"
        " grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l; uname -r"
    )
    zombies, release = apppot.sh(script).ok().decode().split()
    assert zombies == "0"
    assert release.startswith(RELEASE)


def test_report_as_json(apppot: Launcher, place: Path) -> None:
    result = apppot("--json", IMAGE, "sh", "-c", "exit 3")
    assert result.status == 3
    assert json.loads(result.err)["exit_code"] == 3
