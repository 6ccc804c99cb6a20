"""QEMU in emulation: what differs from User-Mode Linux, and falling back when KVM hangs."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher, processes

QEMU = ("--hypervisor", "qemu")
QUIET = ("--network", "none")
# CPUID leaf 0x40000000 is not readable from a shell; the processor's name and this flag are.
PROOF = "uname -r; grep -c QEMU /proc/cpuinfo; grep -c hypervisor /proc/cpuinfo"


def test_a_job_in_emulation(apppot: Launcher) -> None:
    """Arguments, streams, status, stdin and the job directory both ways, in one boot."""
    data = random.Random(5).randbytes(3 << 20)
    (apppot.work / "in").write_bytes(data)
    script = f"{PROOF}; cat in - | sha256sum; cp in out; echo two >&2; printf '<%s>' \"$@\"; exit 7"
    words = (b"a b", b"", b"\xff'\"$x")
    done = apppot(*QEMU, IMAGE, "sh", "-c", script, "sh", *words, feed=data[::-1])
    release, model, flag, digest, rest = done.out.split(b"\n", 4)
    assert done.status == 7, done
    assert release.decode().startswith(RELEASE)
    assert int(model) >= 1
    assert int(flag) >= 1
    assert digest.split()[0].decode() == hashlib.sha256(data + data[::-1]).hexdigest()
    assert (rest, done.err) == (b"".join(b"<%s>" % word for word in words), b"two\n")
    assert (apppot.work / "out").read_bytes() == data
    apppot.await_nothing_left()


def test_the_hosts_own_root_and_binds(apppot: Launcher) -> None:
    aside = apppot.state / "aside"
    aside.mkdir()
    (aside / "one").write_text("file\n")
    options = ("-v", f"{aside}:/srv:ro", "-v", f"{aside}/one:/mnt/two", *QUIET)
    script = "uname -r; cat /srv/one /mnt/two; touch /srv/x; echo $?; echo more >> /mnt/two"
    done = apppot(*QEMU, *options, "host", "sh", "-c", script)
    lines = done.out.decode().splitlines()
    assert lines[0].startswith(RELEASE), done
    assert lines[1:] == ["file", "file", "1"]
    assert (aside / "one").read_text() == "file\nmore\n"


def test_the_network_goes_out_and_not_to_the_hosts_loopback(apppot: Launcher) -> None:
    script = (
        "uname -r; ip -br addr show eth0 2>/dev/null || cat /proc/net/fib_trie | grep 10.0.2.100;"
        "cat /etc/resolv.conf; timeout 5 bash -c 'echo > /dev/tcp/10.0.2.2/22'; echo $?"
    )
    lines = apppot(*QEMU, IMAGE, "sh", "-c", script).out.decode().splitlines()
    assert lines[0].startswith(RELEASE)
    assert "10.0.2.100" in lines[1]
    assert "nameserver 10.0.2.3" in lines
    assert lines[-1] != "0"


def test_the_machine_sees_nothing_else_and_killed_it_is_no_status(apppot: Launcher) -> None:
    running = apppot.start(*QEMU, *QUIET, IMAGE, "sh", "-c", "uname -r; exec sleep 60")
    assert running.line().decode().startswith(RELEASE)
    machines = [
        pid
        for pid in processes(apppot.marker)
        if Path(f"/proc/{pid}/exe").resolve().name.startswith("qemu-system")
    ]
    seen = Path(f"/proc/{machines[0]}/root")
    assert sorted(os.listdir(seen / "view")) == ["image0", "job", "kernel", "net", "run", "runtime"]
    assert not (seen / "root").exists()
    status = Path(f"/proc/{machines[0]}/status").read_text()
    assert "CapEff:\t0000000000000000\n" in status
    assert "NoNewPrivs:\t1\n" in status
    os.kill(machines[0], signal.SIGKILL)
    running.finish().failed("reported no status of the payload")
    apppot.await_nothing_left()


def test_a_panic_is_told_with_the_consoles_last_lines(apppot: Launcher) -> None:
    script = "uname -r; echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 60"
    done = apppot(*QEMU, *QUIET, "-u", "root", IMAGE, "sh", "-c", script)
    assert done.status == 125, done
    text = done.err.decode()
    assert "the guest kernel panicked" in text
    assert "QEMU says why: guest-reset" in text


def test_a_triple_fault_is_told_with_qemus_reason(apppot: Launcher) -> None:
    """Its kernel resets the machine by one (reboot=t)."""
    script = "uname -r; echo b >/proc/sysrq-trigger; sleep 100"
    result = apppot(*QEMU, *QUIET, "-u", "root", IMAGE, "sh", "-c", script)
    assert result.status == 125
    text = result.err.decode()
    assert "reported no status of the payload" in text
    assert "guest-reset" in text
    assert "sysrq: Resetting" in text, "the console's last lines"


def test_exec_joins_without_an_exchange_directory(apppot: Launcher) -> None:
    running = apppot.start(
        *QEMU, *QUIET, "--name", "joined", IMAGE, "sh", "-c", "uname -r; exec sleep 60"
    )
    assert running.line().decode().startswith(RELEASE)
    data = random.Random(6).randbytes(1 << 20)
    many = {f"LONG{number}": "x" * 30000 for number in range(5)}
    options = [word for name in many for word in ("-e", f"{name}={many[name]}")]
    words = (*options, "joined", "sh", "-c", "wc -c; echo ${#LONG4}; exit 3")
    done = apppot(*words, command="exec", feed=data)
    assert (done.status, done.out.split()) == (3, [b"1048576", b"30000"]), done
    running.signal(signal.SIGTERM)
    assert running.wait() == 128 + signal.SIGTERM


@pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs a /dev/kvm that opens"
)
def test_a_silent_hypervisor_is_left_for_the_next_and_remembered(
    apppot: Launcher, place: Path
) -> None:
    cache = place / "cache"
    env = {"APPPOT_HYPERVISOR": "auto", "XDG_CACHE_HOME": str(cache)}
    words = (*QUIET, IMAGE, "sh", "-c", "uname -r; head -1 /proc/cpuinfo; cat")
    first = apppot(*words, feed=b"once", env=env)
    if b"kvm" not in first.err:
        pytest.skip("KVM works on this machine: nothing to fall back from")
    assert first.status == 0, first
    assert b"trying uml" in first.err
    assert first.out.startswith(RELEASE.encode())
    assert first.out.endswith(b"once"), "its input was lost"
    second = apppot(*words, feed=b"twice", env=env)
    assert second.ok().endswith(b"twice")
