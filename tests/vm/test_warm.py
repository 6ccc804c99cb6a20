"""Warm start in QEMU's emulation: a machine is kept once, and runs resume from it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher, Result, argv, eventually, myself, processes

pytestmark = pytest.mark.skipif(
    shutil.which("mksquashfs") is None, reason="needs squashfs-tools for an image of its own"
)


class Kept:
    """A machine that is kept, in a cache of its own, and the words of the runs it serves."""

    def __init__(self, place: Path) -> None:
        tree = place / "tree" / "etc"
        tree.mkdir(parents=True)
        # What systemd takes for a first boot: asks for a machine id.
        (tree / "machine-id").touch()
        image = place / "open-id.squashfs"
        command = ["mksquashfs", str(tree.parent), str(image), "-quiet", "-no-progress"]
        subprocess.run(command, check=True, capture_output=True)
        self.options = ("--hypervisor", "qemu", "--changes", str(image))
        self.cache = place / "cache"

    def env(self, cache: Path | None = None) -> dict[str, str]:
        return {"XDG_CACHE_HOME": str(cache or self.cache), "APPPOT_WARM": "auto"}

    def keep(self, launcher: Launcher) -> Result:
        return launcher(*self.options, IMAGE, command="warm", env=self.env())

    def machines(self) -> list[Path]:
        home = self.cache / "apppot" / "warm"
        return sorted(home.iterdir()) if home.is_dir() else []


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    """One kept machine for all tests here: the boot that it saves them."""
    place = Path(tempfile.mkdtemp(prefix="apppot-vm-"))
    (place / "launcher").mkdir()
    launcher = Launcher(place / "launcher", myself())
    made = Kept(place)
    done = made.keep(launcher)
    assert done.status == 0, done
    assert b"on qemu" in done.out
    yield made
    launcher.close()
    shutil.rmtree(place, ignore_errors=True)


def resumed(report: bytes) -> bool:
    """Whether the run whose stderr ends with this report resumed."""
    timeline = json.loads(report.splitlines()[-1])["timeline"]
    return "resume" in [name for _, name, *_ in timeline]


SCRIPT = """
uname -r; hostname; id; pwd; umask; ulimit -n; tty; cat /etc/hosts /etc/resolv.conf
echo ${#LONG}; cat - in | sha256sum; printf '<%s>' "$@"; ls -l /srv/one; cp in out$1
cat /proc/mounts | cut -d' ' -f2-3 | sort; exit 7
"""


def test_a_resumed_run_is_like_one_that_booted(apppot: Launcher, kept: Kept) -> None:
    """Arguments, a job longer than a frame, streams, job directory both ways, status, time."""
    data = os.urandom(1 << 20)
    (apppot.work / "in").write_bytes(data)
    words = ("-e", "LONG=" + "x" * 100_000, "-u", "root", "--json", IMAGE)
    script = ("sh", "-c", SCRIPT, "sh", "", b"\xff'\"$x", "a b")
    cold, warm = (
        apppot(*kept.options, choice, *words, *script, feed=data, env=kept.env())
        for choice in ("--no-warm", "--warm")
    )
    assert (cold.status, warm.status) == (7, 7), warm
    assert warm.out.decode(errors="replace").startswith(RELEASE)
    assert warm.out == cold.out
    assert (resumed(cold.err), resumed(warm.err)) == (False, True)
    assert (apppot.work / "out").read_bytes() == data
    apppot.await_nothing_left()


def test_its_clock_is_the_hosts(apppot: Launcher, kept: Kept) -> None:
    """It stood still since the machine was kept, a run that booted ago; it has the same pace."""
    (machine,) = kept.machines()
    made = (machine / "devices").stat().st_mtime
    while time.time() - made < 3:
        apppot(*kept.options, IMAGE, "sleep", "1", env=kept.env()).ok()
    before = time.time()
    script = "date +%s.%N; sleep 3; date +%s.%N"
    running = apppot.start(*kept.options, "--json", IMAGE, "sh", "-c", script, env=kept.env())
    first = running.line()
    assert before - 2 < float(first) < time.time() + 2
    begun = time.monotonic()
    done = running.finish()
    assert resumed(done.err)
    assert time.monotonic() - begun > 2
    assert 3 < float(done.out) - float(first) < time.monotonic() - begun + 2


UNIQUE = """
cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid /etc/machine-id
head -c 16 /dev/urandom | od -An -tx1
"""
# A server in the guest: what came in, and who it is.
SERVER = """
use IO::Socket::INET;
my $s = IO::Socket::INET->new(LocalPort => 80, Listen => 1) or die;
$| = 1; print "up\\n";
my $c = $s->accept; my $line = <$c>; print $c "guest heard $line"; close $c;
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_two_that_resume_at_once_share_nothing(apppot: Launcher, kept: Kept) -> None:
    port = free_port()
    script = f"{UNIQUE}exec perl -e '{SERVER}'"
    first = apppot.start(
        *kept.options, "-u", "root", "-p", f"{port}:80", IMAGE, "sh", "-c", script, env=kept.env()
    )
    second = apppot(*kept.options, IMAGE, "sh", "-c", UNIQUE, env=kept.env()).ok()
    ours = [first.line() for _ in range(4)]
    theirs = second.splitlines(keepends=True)
    assert len(theirs) == 4
    assert not set(ours) & set(theirs)
    assert re.fullmatch(rb"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}\n", ours[2])

    machine = next(p for p in processes(apppot.marker) if b"-incoming" in argv(p))
    assert str(kept.cache) not in "".join(open_files(machine)), "it could write what is kept"

    assert first.line() == b"up\n"
    with socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(b"the host\n")
        assert client.makefile("rb").readline() == b"guest heard the host\n"
    assert first.wait() == 0


def open_files(pid: int) -> list[str]:
    folder = Path(f"/proc/{pid}/fd")
    return [os.readlink(path) for path in folder.iterdir()] + [
        Path(f"/proc/{pid}/maps").read_text()
    ]


def test_another_machine_boots_and_explain_says_so(apppot: Launcher, kept: Kept) -> None:
    def start(*words: str) -> str:
        asked = ("--explain", *kept.options, *words, IMAGE)
        lines = apppot(*asked, env=kept.env()).ok().decode().splitlines()
        return next(line for line in lines if line.startswith("start "))

    assert "resumes from" in start()
    for words in (("--mem", "600M"), ("--network", "none"), ("--no-warm",), ("--scratch", "1G")):
        assert "boots" in start(*words)


def test_a_damaged_one_is_deleted_and_the_run_boots(
    apppot: Launcher, kept: Kept, place: Path
) -> None:
    cache = place / "cache"
    shutil.copytree(kept.cache, cache)
    (machine,) = (cache / "apppot" / "warm").iterdir()
    (machine / "devices").chmod(0o600)
    os.truncate(machine / "devices", 1000)
    done = apppot(*kept.options, IMAGE, "sh", "-c", "uname -r; exit 3", env=kept.env(cache))
    assert done.status == 3, done
    assert done.out.decode().startswith(RELEASE)
    assert b"starting cold" in done.err
    assert list((cache / "apppot" / "warm").iterdir()) == []


def test_nothing_is_kept_of_one_that_was_killed(apppot: Launcher, kept: Kept, place: Path) -> None:
    cache = place / "cache"
    options = ("--mem", "400M", *kept.options, IMAGE)
    making = apppot.start(*options, command="warm", env=kept.env(cache))
    assert eventually(lambda: len(processes(apppot.marker)) > 1)
    making.signal(signal.SIGKILL)
    making.wait()
    apppot.await_nothing_left()
    assert list(cache.glob("apppot/warm/*")) == []
    listed = apppot("--list", "--json", command="warm", env=kept.env(cache))
    assert json.loads(listed.ok()) == []


def test_they_are_listed_and_deleted(apppot: Launcher, kept: Kept, place: Path) -> None:
    cache = place / "cache"
    shutil.copytree(kept.cache, cache)
    (row,) = json.loads(apppot("--list", "--json", command="warm", env=kept.env(cache)).ok())
    assert (row["image"], row["hypervisor"], row["memory"]) == (IMAGE, "qemu", 512 << 20)
    apppot("--rm", "other", command="warm", env=kept.env(cache)).failed(f"machines of: {IMAGE}")
    apppot("--rm", IMAGE, command="warm", env=kept.env(cache)).ok()
    assert list((cache / "apppot" / "warm").iterdir()) == []


def test_user_mode_linux_keeps_none(apppot: Launcher, kept: Kept) -> None:
    apppot(IMAGE, command="warm", env=kept.env()).failed("uml keeps no machines", "--hypervisor")
