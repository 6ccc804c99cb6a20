"""What a payload sees around it: accounts, limits, time zone, names, network, the host's root."""

from __future__ import annotations

import http.server
import os
import resource
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.harness import network_frames
from tests.harness.vm import IMAGE, RELEASE, Launcher, eventually


def _after_release(out: bytes) -> list[str]:
    """The lines after the first one, which is a guest kernel's release."""
    lines = out.decode().splitlines()
    assert lines[0].startswith(RELEASE)
    return lines[1:]


def test_time_zone_of_the_environment(apppot: Launcher) -> None:
    out = apppot.sh("uname -r; date -d @1700000000 +%H:%M%z", env={"TZ": "Asia/Kolkata"}).ok()
    assert _after_release(out) == ["03:43+0530"]


def test_time_zone_of_the_host(apppot: Launcher) -> None:
    mine = Path("/etc/localtime").read_bytes() if os.path.exists("/etc/localtime") else None
    if mine is None:
        pytest.skip("this host has no /etc/localtime")
    got = apppot.sh("cat /etc/localtime", env={}).ok()
    assert got == mine


def test_clock(apppot: Launcher) -> None:
    before = time.time()
    at = float(_after_release(apppot.sh("uname -r; date +%s.%N").ok())[0])
    assert before - 1 < at < time.time() + 1


def test_locale(apppot: Launcher) -> None:
    given = {"LANG": "de_DE.UTF-8", "LC_NUMERIC": "fr_FR.UTF-8", "LANGUAGE": "de"}
    out = apppot.sh("uname -r; echo $LANG $LC_NUMERIC $LANGUAGE", env=given).ok()
    assert _after_release(out) == ["de_DE.UTF-8 fr_FR.UTF-8 de"]


def test_host_name(apppot: Launcher) -> None:
    out = apppot("--hostname", "node7", IMAGE, "sh", "-c", "uname -r; hostname; cat /etc/hostname")
    assert _after_release(out.ok()) == ["node7", "node7"]
    assert _after_release(apppot.sh("uname -r; uname -n").ok()) == ["apppot"]


def test_limits(apppot: Launcher) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (77, 200))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 40))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    # A console file would come under the limit as well.
    result = apppot.start(
        IMAGE, "bash", "-c", "uname -r; ulimit -Sn; ulimit -Hn; ulimit -f; ulimit -c",
        before_exec=limit, env={"APPPOT_LOG": ""},
    ).finish()  # fmt: skip
    assert _after_release(result.ok()) == ["77", "200", "1024", "0"]


def test_hard_limit_on_file_size(apppot: Launcher) -> None:
    """Lower than the guest's memory file: told beforehand."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    apppot(IMAGE, "true", before_exec=limit).failed("ulimit -f", "remedy:")


def test_groups(apppot: Launcher) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give itself groups")
    out = apppot.start(
        IMAGE, "sh", "-c", "uname -r; id -G", before_exec=lambda: os.setgroups([0, 4242])
    ).finish()
    (groups,) = _after_release(out.ok())
    assert "0" in groups.split()


def test_groups_of_an_ordinary_user(user: Launcher) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give groups to another account")
    words = ["--reuid", str(user.who.uid), "--regid", str(user.who.gid), "--groups", "4242,27"]
    root = Launcher.__new__(Launcher)
    root.__dict__.update(user.__dict__)
    root.who = type(user.who)(0, 0, ("setpriv", *words, *user.who.command), user.who.env)
    out = root(IMAGE, "sh", "-c", "uname -r; id -G").ok()
    (groups,) = _after_release(out)
    assert {"4242", "27", str(user.who.gid)} <= set(groups.split())


def test_user_options(apppot: Launcher) -> None:
    assert _after_release(apppot("-u", "nobody", IMAGE, "sh", "-c", "uname -r; id -un").ok()) == [
        "nobody"
    ]
    out = apppot("-u", "1234:4321", IMAGE, "sh", "-c", "uname -r; id -u; id -g").ok()
    assert _after_release(out) == ["1234", "4321"]


def test_sudo(user: Launcher) -> None:
    out = user.sh(
        "uname -r; id -u; sudo -n id -u; sudo -n sh -c 'echo x > /etc/new && cat /etc/new'"
    )
    assert _after_release(out.ok()) == [str(user.who.uid), "0", "x"]


def test_memory_is_as_asked_for(apppot: Launcher) -> None:
    out = apppot("--mem", "200M", IMAGE, "sh", "-c", "uname -r; grep MemTotal /proc/meminfo").ok()
    kilobytes = int(_after_release(out)[0].split()[1])
    assert 160 << 10 < kilobytes <= 200 << 10


def test_cpus(apppot: Launcher) -> None:
    out = apppot("--cpus", "2", IMAGE, "sh", "-c", "uname -r; nproc").ok()
    assert _after_release(out) == ["2"]


def test_scratch(apppot: Launcher) -> None:
    script = (
        "uname -r; df --output=size -k / | tail -1; head -c 300M /dev/zero > /big; stat -c %s /big"
    )
    out = apppot("--scratch", "1G", "--mem", "128M", "-u", "root", IMAGE, "sh", "-c", script).ok()
    size, written = _after_release(out)
    assert int(size) > 800 << 10
    assert int(written) == 300 << 20


def test_without_a_controlling_terminal(apppot: Launcher) -> None:
    result = apppot.start(IMAGE, "uname", "-r", wrap=("setsid", "--wait"), stdin=None).finish()
    assert result.ok().decode().startswith(RELEASE)


# -- network ---------------------------------------------------------------------------------


def test_no_network(apppot: Launcher) -> None:
    script = "uname -r; ls /sys/class/net; cat /proc/net/route | wc -l"
    out = apppot("--network", "none", IMAGE, "sh", "-c", script).ok()
    *interfaces, routes = _after_release(out)
    assert not [name for name in interfaces if name.startswith("vec")]
    assert "lo" in interfaces
    assert routes == "1"


def test_interface_and_resolver(apppot: Launcher) -> None:
    script = "uname -r; ip -4 -o addr show vec0; ip route; cat /etc/resolv.conf"
    address, *rest = _after_release(apppot.sh(script).ok())
    assert "10.0.2.100/24" in address
    assert rest[0].startswith("default via 10.0.2.2 dev vec0")
    assert rest[-1] == "nameserver 10.0.2.3"


def test_loopback_of_the_host_is_closed(apppot: Launcher) -> None:
    """A server on the host that answers the host, and not the guest."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        port = server.server_port
        with socket.create_connection(("127.0.0.1", port), 5):
            pass
        script = f"uname -r; curl -sS -m 5 --noproxy '*' http://10.0.2.2:{port}/ || echo refused"
        result = apppot.sh(script)
        assert _after_release(result.out) == ["refused"]
    finally:
        server.shutdown()
        server.server_close()


_SERVER = r"""
use strict; use IO::Socket::INET; $| = 1;
my $s = IO::Socket::INET->new(Listen => 1, LocalPort => 8080, ReuseAddr => 1) or die "listen: $!";
print "listening\n"; my $c = $s->accept; print $c `uname -r`; close $c;
"""


# A frame of root's own making, through a raw socket; the refusal of another port comes after it.
_MADE_UP = r"""
use strict; use IO::Socket::INET;
open(my $index, "</sys/class/net/$ARGV[0]/ifindex") or die "index: $!";
socket(my $raw, 17, 3, 0) or die "socket: $!";
my $place = pack("S n i S C C a8", 17, 0, <$index>, 0, 0, 6, "");
send($raw, pack("H*", $ARGV[1]), 0, $place) or die "send: $!";
IO::Socket::INET->new(PeerAddr => "10.0.2.2", PeerPort => 1, Timeout => 3);
print `uname -r`;
"""


def test_no_frame_of_the_guests_root_reaches_the_hosts_loopback(apppot: Launcher) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        frame = network_frames.syn("127.0.0.1", listener.getsockname()[1])
        words = ("-u", "root", IMAGE, "perl", "-e", _MADE_UP, "vec0", frame.hex())
        assert apppot(*words).ok().decode().startswith(RELEASE)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_forwarded_port(apppot: Launcher) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = apppot.start("-p", f"{port}:8080", IMAGE, "perl", "-e", _SERVER)
    assert running.line() == b"listening\n"
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        assert client.makefile().readline().startswith(RELEASE)
    assert running.finish().status == 0


def test_forwarded_port_that_is_taken(apppot: Launcher) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        apppot("-p", f"{port}:80", IMAGE, "true").failed(str(port), "remedy:")
    assert apppot.left() == []


def test_apt_get(user: Launcher) -> None:
    """Package lists come through the user network, with sudo, by name."""
    probe = user.sh("getent hosts deb.debian.org", env={})
    if probe.status != 0:
        pytest.skip("the Debian mirror cannot be resolved from here")
    result = user.sh("uname -r; sudo -n -E apt-get update 2>&1; ls /var/lib/apt/lists | wc -l")
    if result.status != 0 or b"Err:" in result.out:
        pytest.skip(f"the Debian mirror cannot be reached: {result.out[-300:]!r}")
    assert int(_after_release(result.out)[-1]) > 2


# -- the host's own root ---------------------------------------------------------------------


def test_host_image(apppot: Launcher, place: Path) -> None:
    """The host's root, copy on write: what the guest does to it stays in the guest."""
    marker = Path("/usr/local/share") / f"apppot-test-{os.getpid()}"
    script = (
        f"uname -r; echo new > {marker} && cat {marker}; rm /etc/hostname; ls /etc/hostname; "
        "echo line >> /etc/passwd; tail -1 /etc/passwd"
    )
    before = Path("/etc/passwd").read_bytes()
    result = apppot("-u", "root", "host", "sh", "-c", script)
    assert _after_release(result.out)[::1] == ["new", "line"]
    assert not marker.exists()
    assert os.path.exists("/etc/hostname")
    assert Path("/etc/passwd").read_bytes() == before


@pytest.mark.parametrize("path", ["/root", "/mnt", "/var/tmp", "/media"])
def test_host_image_hides(apppot: Launcher, path: str) -> None:
    out = apppot("host", "sh", "-c", f"uname -r; ls -A {path} | wc -l").ok()
    assert _after_release(out) == ["0"]


def test_host_image_as_an_ordinary_user(user: Launcher) -> None:
    out = user("host", "sh", "-c", "uname -r; id -u; id -un; touch made; command -v python3").ok()
    uid, name, python = _after_release(out)
    assert (int(uid), name) == (user.who.uid, "user")
    assert python.endswith("python3")
    assert (user.work / "made").stat().st_uid == user.who.uid


def test_host_programs_run(apppot: Launcher) -> None:
    assert shutil.which("python3")
    out = apppot("host", "/usr/bin/python3", "-c", "import os; print(os.uname().release)").ok()
    assert out.decode().startswith(RELEASE)


def test_ordinary_user(user: Launcher) -> None:
    """The everyday case, from a start without root to a clean end."""
    result = user.sh("uname -r; cat", feed=b"through\n")
    assert _after_release(result.ok()) == ["through"]
    assert user.left() == []


def test_ordinary_user_killed(user: Launcher) -> None:
    running = user.start(IMAGE, "sh", "-c", "uname -r; sleep 100")
    assert running.line().decode().startswith(RELEASE)
    running.signal(signal.SIGKILL)
    assert eventually(lambda: not user.left(), 6), user.left()
