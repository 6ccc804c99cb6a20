"""The smaller set on Debian's own User-Mode Linux kernel: the fall-back must be complete."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from apppot.host.common import paths

from tests.harness.vm import IMAGE, Launcher, Result, Word

STOCK = "/usr/bin/linux.uml"
HINT = b"`apppot pot build`"

pytestmark = [
    pytest.mark.stock,
    pytest.mark.skipif(not os.path.exists(STOCK), reason="no package user-mode-linux"),
]

Run = Callable[..., Result]


@pytest.fixture(params=["apppot", "user"])
def stock(request: pytest.FixtureRequest) -> Run:
    """Runs on Debian's kernel, as the account of the tests and as an ordinary user."""
    launcher: Launcher = request.getfixturevalue(request.param)

    def run(*words: Word, **options: object) -> Result:
        return launcher("--kernel", STOCK, *words, **options)  # type: ignore[arg-type]

    return run


def said(result: Result) -> bytes:
    """The stdout of a run that succeeded, with the hint on stderr."""
    assert result.status == 0, result
    assert HINT in result.err, result
    # No more but the warning that this kernel bears only so much memory.
    assert result.err.count(b"\n") <= 3, result
    return result.out


def test_the_guest_runs_debians_kernel_and_its_status_comes_back(stock: Run) -> None:
    done = stock(IMAGE, "sh", "-c", "uname -r; id -un; exit 42")
    release, name = done.out.split()
    assert done.status == 42
    assert re.fullmatch(rb"6\.\d+\.\d+.*", release)
    assert name in (b"user", b"root")


def test_arguments_are_exact(stock: Run) -> None:
    words = [b"a  b", b"", b"'\"$x\\", b"line\nline", bytes(range(1, 256)), "ü".encode()]
    out = said(stock(IMAGE, "printf", r"%s\0", *words))
    assert out == b"".join(word + b"\0" for word in words)


def test_streams_are_exact_and_apart(stock: Run) -> None:
    data = os.urandom(3 << 20)
    done = stock(IMAGE, "sh", "-c", "tee /dev/fd/2", feed=data)
    assert done.status == 0
    assert done.out == data
    assert done.err.endswith(data)
    assert HINT in done.err[: -len(data)]


def test_the_job_directory_is_the_hosts(apppot: Launcher, user: Launcher) -> None:
    for launcher in (apppot, user):
        (launcher.work / "in").write_bytes(b"\0input\xff")
        script = "cp in out && uname -r && pwd"
        out = said(launcher("--kernel", STOCK, IMAGE, "sh", "-c", script))
        assert out.startswith(b"6.") and out.endswith(b"\n/home/user/job\n")
        copy = launcher.work / "out"
        assert copy.read_bytes() == b"\0input\xff"
        assert copy.stat().st_uid == launcher.who.uid


def test_the_network_reaches_its_gateway(stock: Run) -> None:
    # The gateway's answer to "who has 10.0.2.2" has gone there and back.
    script = "echo >/dev/udp/10.0.2.2/9; sleep 0.5; ip neigh show 10.0.2.2; ip -4 -o addr"
    out = said(stock(IMAGE, "bash", "-c", script))
    assert b"lladdr 52:55:0a:00:02:02" in out
    assert b"10.0.2.100/24" in out


def test_the_hosts_root_is_an_image(stock: Run) -> None:
    script = "uname -r; cat /etc/os-release; echo x >/etc/apppot-test"
    words = ["--network", "none", "--user", "root", "host", "sh", "-c", script]
    release, rest = said(stock(*words)).split(b"\n", 1)
    assert release.startswith(b"6.")
    assert rest == Path("/etc/os-release").read_bytes()
    assert not Path("/etc/apppot-test").exists()


@pytest.mark.parametrize("confine", ["bubblewrap", "landlock", "off"])
def test_it_runs_however_it_is_confined(stock: Run, confine: str) -> None:
    words = ["--confine", confine, "--network", "none", IMAGE, "cat", "/proc/sys/kernel/osrelease"]
    assert said(stock(*words)).startswith(b"6.")


def test_a_signal_ends_the_payload_and_nothing_is_left(apppot: Launcher) -> None:
    running = apppot.start("--kernel", STOCK, IMAGE, "sh", "-c", "echo up; exec sleep 1000")
    assert running.line() == b"up\n"
    running.signal(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM
    apppot.await_nothing_left()


def test_a_killed_launcher_takes_the_guest_along(apppot: Launcher) -> None:
    running = apppot.start("--kernel", STOCK, IMAGE, "sh", "-c", "echo up; exec sleep 1000")
    assert running.line() == b"up\n"
    os.kill(running.pid, signal.SIGKILL)
    apppot.await_nothing_left()


def test_two_cpus_are_refused_with_the_remedy(apppot: Launcher) -> None:
    result = apppot("--kernel", STOCK, "--cpus", "2", IMAGE, "true")
    result.failed("one CPU only", "apppot kernel build")


def test_a_pot_without_a_kernel_falls_back_and_says_how_to_mend_it(
    apppot: Launcher, place: Path
) -> None:
    pot = place / "pot"
    ignored = shutil.ignore_patterns("kernel", "work")
    shutil.copytree(paths.pot_home(), pot, ignore=ignored)
    manifest = pot / "pot.json"
    manifest.write_text(manifest.read_text().replace('"kernel"', '"was"'))
    done = apppot(IMAGE, "uname", "-r", env={"APPPOT_POT": str(pot)})
    assert said(done).startswith(b"6.")
    assert b"ten times faster" in done.err
