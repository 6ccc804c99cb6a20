"""QEMU on a host that is not the usual one: Debian 13 with virtiofsd, an ordinary user's launcher.

Also machines of kinds that this host's QEMU has, but would not take by itself.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from apppot.host.common.errors import ApppotError

from tests.harness import other_host
from tests.harness.vm import IMAGE, RELEASE, TIMEOUT, Launcher, argv, eventually, processes

QUIET = ("--network", "none")
MOUNTED = "cut -d' ' -f1-3 /proc/mounts | grep -E '^(job|bind)'"


@pytest.fixture(scope="session")
def debian_13() -> Path:
    try:
        return other_host.root()
    except ApppotError as error:
        pytest.skip(f"a root of Debian 13 cannot be made here: {error}")


@pytest.fixture
def there(debian_13: Path, place: Path) -> Iterator[Launcher]:
    """A launcher on Debian 13."""
    made = other_host.launcher(place, debian_13)
    yield made
    made.close()


def servers(launcher: Launcher) -> list[int]:
    """The file servers of a launcher's runs, by what they see of this host."""
    found = processes(str(launcher.work.parent))
    return [pid for pid in found if argv(pid)[0].endswith(b"virtiofsd")]


@pytest.mark.timeout(900)  # the first builds the host's root
def test_a_job_over_virtiofs(there: Launcher, place: Path) -> None:
    """Job directory and binds both ways, live, whoever writes; stdin, network and status."""
    data = random.Random(13).randbytes(3 << 20)
    (there.work / "in").write_bytes(data)
    aside = place / "aside"
    aside.mkdir()
    (aside / "one").write_text("file\n")
    script = f"""
        uname -r; {MOUNTED}; cat in - | sha256sum; cat /srv/one; touch /srv/x 2>&1
        sudo sh -c 'cp in out; mkdir -m 700 made; mkfifo made/fifo; chown 0:0 out'
        stat -c '%U %s %a' out made; grep -o 10.0.2.100 /proc/net/fib_trie | head -1; exit 7
    """
    done = there("-v", f"{aside}:/srv:ro", IMAGE, "sh", "-c", script, feed=data[::-1])
    lines = done.out.decode().splitlines()
    assert (done.status, done.err) == (7, b""), done
    assert lines[0].startswith(RELEASE)
    assert lines[1:] == [
        "job /home/user/job virtiofs",
        "bind0 /srv virtiofs",
        f"{hashlib.sha256(data + data[::-1]).hexdigest()}  -",
        "file",
        "touch: cannot touch '/srv/x': Read-only file system",
        f"user {len(data)} 644",
        "user 4096 700",
        "10.0.2.100",
    ]
    assert (there.work / "out").read_bytes() == data
    assert (there.work / "out").stat().st_uid == there.work.stat().st_uid
    assert (there.work / "made" / "fifo").is_fifo()
    there.await_nothing_left()
    assert servers(there) == []


def test_file_servers_are_held_and_die_with_the_launcher(there: Launcher, place: Path) -> None:
    script = "uname -r; while ! grep -q host note; do sleep 0.1; done; echo seen; exec sleep 60"
    (there.work / "note").write_text("guest\n")
    running = there.start(*QUIET, "-v", f"{place}:/srv:ro", IMAGE, "sh", "-c", script)
    assert running.line().decode().startswith(RELEASE)
    (there.work / "note").write_text("host\n")
    assert running.line() == b"seen\n", "what the host changes shows at once"
    views = [Path(f"/proc/{pid}/root/view") for pid in servers(there)]
    assert sorted(os.listdir(view)[0] for view in views) == ["bind0", "job"]
    (machine,) = [
        pid for pid in processes(there.marker) if argv(pid)[0].endswith(b"qemu-system-x86_64")
    ]
    seen = os.listdir(f"/proc/{machine}/root/view")
    assert sorted(seen) == ["image0", "kernel", "net", "run", "runtime"]
    # Below the bubblewrap that shows it Debian 13.
    (launcher,) = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    assert argv(int(launcher))[0].endswith(b"python3")
    os.kill(int(launcher), signal.SIGKILL)
    there.await_nothing_left()
    assert eventually(lambda: servers(there) == [], TIMEOUT)


def test_a_machine_is_kept_and_resumes_on_qemu_10(there: Launcher) -> None:
    """With 9p: what a file server knows of a guest is not kept."""
    warm = {"APPPOT_WARM": "auto"}
    assert b"on qemu" in there(*QUIET, IMAGE, command="warm", env=warm).ok()
    data = os.urandom(1 << 20)
    (there.work / "in").write_bytes(data)
    script = f"uname -r; {MOUNTED}; cp in out; exit 3"
    done = there(*QUIET, "--json", IMAGE, "sh", "-c", script, env=warm)
    assert done.status == 3, done
    assert b'"resume"' in done.err
    lines = done.out.decode().splitlines()
    assert lines[0].startswith(RELEASE)
    assert lines[1:] == ["job /home/user/job 9p"]
    assert (there.work / "out").read_bytes() == data
    there.await_nothing_left()


SERVER = """
use IO::Socket::INET; $| = 1;
my $out = IO::Socket::INET->new(PeerAddr => "10.0.2.2", PeerPort => $ARGV[0], Timeout => 2);
print $out ? "open " : "closed ";
my $in = IO::Socket::INET->new(Listen => 1, LocalPort => 8080) or die $!;
print "listening\n";
my $c = $in->accept; print $c `uname -r`; print scalar <$c>;
"""


def test_qemus_own_user_network_where_slirp4netns_is_missing(debian_13: Path, place: Path) -> None:
    """A forwarded port, both ways, under the same address; the host's loopback stays closed."""
    there = other_host.launcher(place, debian_13, "/usr/bin/slirp4netns")
    with socket.create_server(("127.0.0.1", 0)) as loopback, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port, closed = free.getsockname()[1], loopback.getsockname()[1]
        free.close()
        words = ("-p", f"{port}:8080", IMAGE, "perl", "-e", SERVER, str(closed))
        running = there.start(*words)
        assert running.line() == b"closed listening\n"
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            assert client.makefile().readline().startswith(RELEASE)
            client.sendall(b"from the host\n")
            assert running.finish().ok() == b"from the host\n"
        loopback.setblocking(False)
        with pytest.raises(BlockingIOError):
            loopback.accept()
    there.await_nothing_left()
    there.close()


def test_a_job_on_q35(apppot: Launcher) -> None:
    """With PCI, as a QEMU without `microvm` has it."""
    data = random.Random(35).randbytes(1 << 20)
    (apppot.work / "in").write_bytes(data)
    script = (
        f"uname -r; {MOUNTED}; ls /sys/bus/pci/devices | wc -l; cat in - | sha256sum; cp in out;"
        "grep -o 10.0.2.100 /proc/net/fib_trie | head -1; exit 7"
    )
    env = {"APPPOT_QEMU_MACHINE": "q35"}
    words = ("--hypervisor", "qemu", "--scratch", "1G", IMAGE, "sh", "-c", script)
    done = apppot(*words, feed=data[::-1], env=env)
    release, mount, devices, digest, address = done.out.decode().splitlines()
    assert (done.status, done.err) == (7, b""), done
    assert release.startswith(RELEASE)
    assert mount == "job /home/user/job 9p"
    assert int(devices) > 5
    assert digest.split()[0] == hashlib.sha256(data + data[::-1]).hexdigest()
    assert address == "10.0.2.100"
    assert (apppot.work / "out").read_bytes() == data


def test_a_job_directory_that_qemu_cannot_show_is_copied(apppot: Launcher) -> None:
    (apppot.work / "in").write_text("in\n")
    env = {"APPPOT_QEMU_SHARE": "none", "APPPOT_HYPERVISOR": "qemu"}
    done = apppot(*QUIET, IMAGE, "sh", "-c", f"uname -r; {MOUNTED}; cat in >out", env=env)
    assert done.out.decode().startswith(RELEASE), done
    assert done.out.count(b"\n") == 1, "nothing of the host is mounted"
    assert b"the job directory is copied" in done.err
    assert (apppot.work / "out").read_text() == "in\n"
    bound = apppot(*QUIET, "-v", "/etc:/srv", IMAGE, "true", env=env)
    bound.failed("--bind shows directories of this host, which qemu cannot")
