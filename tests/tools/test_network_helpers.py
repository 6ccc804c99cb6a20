"""What a guest's root can make up for the host's loopback, sent to the network helpers by hand."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apppot.host.common.errors import HypervisorError
from apppot.host.confinement.sandbox import unconfined
from apppot.host.network import filter, guard, usernet
from apppot.host.network import slirp as network

from tests.harness.network_frames import ask, syn

QEMU, SLIRP = map(shutil.which, ("qemu-system-x86_64", "slirp4netns"))
HELD = unconfined("/nowhere", "/nowhere")
needs_qemu = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86")
needs_slirp = pytest.mark.skipif(SLIRP is None, reason="needs slirp4netns")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("0.0.0.0", 0)) as server:
        server.setblocking(False)
        yield server


Helper = Callable[[], socket.socket]


@pytest.fixture
def qemu() -> Iterator[Helper]:
    """Starts QEMU's user network and gives a machine's end of it."""
    started = []

    def start() -> socket.socket:
        assert QEMU is not None
        started.append(usernet.start(QEMU, HELD, (), bool))
        return started[-1][2]

    yield start
    for child, output, wire in started:
        child.kill()
        os.close(output)
        wire.close()


@pytest.fixture
def slirp(tmp_path: Path) -> Iterator[tuple[int, int, socket.socket]]:
    """The pid of a slirp4netns, what says that it is connected, and a machine's end of it."""
    assert SLIRP is not None
    (tmp_path / "net").mkdir()
    held = unconfined(str(tmp_path), str(tmp_path))
    child, output, connected = network.start(SLIRP, held, "net", bool)
    with network.connect(output, str(tmp_path / "net")) as wire:
        ask(wire)
        yield child.pid, connected, wire
    child.kill()
    os.close(output)
    os.close(connected)


def reaches(listener: socket.socket, wire: socket.socket, address: str) -> bool:
    """Whether a guest's packet to that address is a connection to this host's loopback."""
    wire.send(syn(address, listener.getsockname()[1]))
    ask(wire)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@needs_qemu
def test_qemus_user_network_does_not_lead_to_the_loopback(
    listener: socket.socket, qemu: Helper
) -> None:
    wire = qemu()
    for address in ("10.0.2.2", "127.0.0.1", "127.0.0.53", "0.0.0.0"):
        assert not reaches(listener, wire, address), address


@needs_qemu
def test_without_the_filter_it_does(
    listener: socket.socket, qemu: Helper, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(usernet, "pair", lambda: plain)
    wire = qemu()
    assert reaches(listener, wire, "10.0.2.2")


@needs_slirp
def test_slirp4netns_is_guarded_from_outside(
    listener: socket.socket, slirp: tuple[int, int, socket.socket]
) -> None:
    """It takes a frame to 127.0.0.1 there, until it is; once is for good."""
    pid, connected, wire = slirp
    assert reaches(listener, wire, "127.0.0.1"), "the attack itself does not work"
    guard.guard(pid, connected)
    for address in ("10.0.2.2", "127.0.0.1", "127.0.0.53", "0.0.0.0"):
        assert not reaches(listener, wire, address), address
    with pytest.raises(PermissionError):
        guard.guard(pid, connected)


@needs_slirp
def test_descriptors_that_the_helper_closes_meanwhile_are_passed_over(
    listener: socket.socket,
    slirp: tuple[int, int, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pid, connected, wire = slirp
    before, link = "4094", "4095"  # it looks, and takes, when they are closed
    listed, followed = os.listdir, os.readlink
    monkeypatch.setattr(os, "listdir", lambda path: [before, link, *listed(path)])
    monkeypatch.setattr(
        os, "readlink", lambda path: "socket:[1]" if path.endswith(link) else followed(path)
    )
    guard.guard(pid, connected)
    assert not reaches(listener, wire, "127.0.0.1")


@needs_slirp
def test_a_helper_that_nobody_is_connected_to_cannot_be_guarded() -> None:
    sleeper = subprocess.Popen(["sh", "-c", "echo; exec sleep 60"], stdout=subprocess.PIPE)
    assert sleeper.stdout is not None
    with pytest.raises(OSError, match="no guest"):
        guard.guard(sleeper.pid, sleeper.stdout.fileno())
    sleeper.kill()
    sleeper.communicate()


@needs_qemu
def test_a_port_that_is_taken_is_said(listener: socket.socket) -> None:
    assert QEMU is not None
    port = listener.getsockname()[1]
    with pytest.raises(HypervisorError, match=f"forwarded: .*{port}") as caught:
        usernet.start(QEMU, HELD, ((port, 80),), bool)
    assert "another port" in caught.value.hint
    left = subprocess.run(["pgrep", "-f", f"127.0.0.1:{port}-"], capture_output=True, check=False)
    assert left.stdout == b""


def test_a_filter_that_is_no_program_is_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, pytest.raises(OSError, match="Invalid argument"):
        filter.attach(theirs, {"start": [(0x06, "", "", 0), (0xFFFF, "", "", 0)]})
