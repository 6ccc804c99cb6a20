"""QEMU's user network, asked by hand for a connection to the host's loopback."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest
from apppot.host import confine, usernet
from apppot.host.errors import HypervisorError

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="needs qemu-system-x86")
GUEST, GATEWAY = socket.inet_aton("10.0.2.100"), socket.inet_aton("10.0.2.2")
HARDWARE = b"\x52\x54\0\x12\x34\x56"


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def syn(port: int) -> bytes:
    """The frame that asks the gateway's address for a connection."""
    segment = struct.pack("!HHIIBBHHH", 4000, port, 1, 0, 5 << 4, 2, 8192, 0, 0)
    pseudo = GUEST + GATEWAY + struct.pack("!HH", 6, len(segment))
    segment = segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + GUEST + GATEWAY
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return b"\x52\x55\x0a\0\2\2" + HARDWARE + b"\x08\0" + head + segment


def question() -> bytes:
    """Who has the gateway's address?  What came before is done when the answer comes."""
    asked = struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
    return b"\xff" * 6 + HARDWARE + asked + HARDWARE + GUEST + bytes(6) + GATEWAY


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


def reaches(listener: socket.socket) -> bool:
    """Whether a guest's packet to the gateway is a connection to this host's loopback."""
    assert QEMU is not None
    held = confine.unconfined("/nowhere", "/nowhere")
    child, output, wire = usernet.start(QEMU, held, (), bool)
    try:
        wire.settimeout(60)
        wire.send(syn(listener.getsockname()[1]))
        wire.send(question())
        while wire.recv(2048)[12:14] != b"\x08\x06":
            pass
        listener.accept()[0].close()
        return True
    except BlockingIOError:
        return False
    finally:
        child.kill()
        wire.close()
        open(output, "rb").close()


def test_the_hosts_loopback_is_closed(listener: socket.socket) -> None:
    assert not reaches(listener)


def test_without_the_filter_it_is_open(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes the test above one that can fail."""
    plain = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(usernet, "pair", lambda: plain)
    assert reaches(listener)


def test_a_port_that_is_taken_is_said(listener: socket.socket) -> None:
    assert QEMU is not None
    port = listener.getsockname()[1]
    held = confine.unconfined("/nowhere", "/nowhere")
    with pytest.raises(HypervisorError, match=f"forwarded: .*{port}") as caught:
        usernet.start(QEMU, held, ((port, 80),), bool)
    assert "another port" in caught.value.hint
    left = subprocess.run(["pgrep", "-f", f"127.0.0.1:{port}-"], capture_output=True, check=False)
    assert left.stdout == b""
