"""The filter in front of QEMU's user network, on a pair of sockets, and the helper's arguments."""

from __future__ import annotations

import socket
import struct

import pytest
from apppot.host.network import usernet

GUEST = "10.0.2.100"


def frame(kind: int, payload: bytes) -> bytes:
    return b"\x52\x55\x0a\0\2\2" + b"\x52\x54\0\x12\x34\x56" + struct.pack("!H", kind) + payload


def ipv4(target: str, protocol: int, payload: bytes, fragment: int = 0, options: int = 0) -> bytes:
    head = struct.pack(
        "!BBHHHBBH4s4s",
        *(0x45 + options, 0, 20 + 4 * options + len(payload), 1, fragment, 64, protocol, 0),
        *(socket.inet_aton(GUEST), socket.inet_aton(target)),
    )
    return frame(0x0800, head + bytes([1]) * 4 * options + payload)


def tcp(port: int, flags: int) -> bytes:
    return struct.pack("!HHIIBBHHH", 4000, port, 1, 0, 5 << 4, flags, 8192, 0, 0)


def udp(port: int) -> bytes:
    return struct.pack("!HHHH", 4000, port, 8, 0)


SYN, ACK, RST = 2, 16, 4
TAKEN = {
    "who has an address": frame(0x0806, bytes(28)),
    "a connection to the world": ipv4("192.0.2.1", 6, tcp(80, SYN)),
    "part of a packet to the world": ipv4("192.0.2.1", 17, bytes(8), fragment=0x2000),
    "a question for a name": ipv4("10.0.2.3", 17, udp(53)),
    "a longer one": ipv4("10.0.2.3", 6, tcp(53, SYN)),
    "an answer to a forwarded port": ipv4("10.0.2.2", 6, tcp(80, SYN | ACK)),
    "the same with options": ipv4("10.0.2.2", 6, tcp(80, ACK), options=3),
    "no to a forwarded port": ipv4("10.0.2.2", 6, tcp(80, RST)),
}
DROPPED = {
    "IPv6": frame(0x86DD, bytes(60)),
    "nothing": b"",
    "too short": ipv4("192.0.2.1", 6, b"")[:30],
    "the host's loopback": ipv4("10.0.2.2", 6, tcp(22, SYN)),
    "the same with odd flags": ipv4("10.0.2.2", 6, tcp(22, SYN | RST)),
    "the same with options": ipv4("10.0.2.2", 6, tcp(22, SYN), options=10),
    "the same in parts": ipv4("10.0.2.2", 6, tcp(22, ACK), fragment=0x2000),
    "the same by UDP": ipv4("10.0.2.2", 17, udp(53)),
    "an address that nobody has": ipv4("10.0.2.99", 6, tcp(22, SYN)),
    "the broadcast": ipv4("10.0.2.255", 17, udp(53)),
    "all hosts": ipv4("255.255.255.255", 6, tcp(22, SYN)),
    "loopback by its name": ipv4("127.0.0.1", 6, tcp(22, SYN)),
    "no address": ipv4("0.0.0.0", 6, tcp(22, SYN)),
    "another port of the name server": ipv4("10.0.2.3", 6, tcp(22, SYN)),
    "part of a question": ipv4("10.0.2.3", 17, udp(53), fragment=1),
    "an echo request to the gateway": ipv4("10.0.2.2", 1, bytes(8)),
}


def passes(packet: bytes) -> bool:
    machine, helper = usernet.pair()
    with machine, helper:
        machine.send(packet)
        try:
            return helper.recv(4096, socket.MSG_DONTWAIT) == packet
        except BlockingIOError:
            return False


@pytest.mark.parametrize("packet", TAKEN.values(), ids=TAKEN)
def test_what_the_helper_takes(packet: bytes) -> None:
    assert passes(packet)


@pytest.mark.parametrize("packet", DROPPED.values(), ids=DROPPED)
def test_what_the_helper_does_not_take(packet: bytes) -> None:
    assert not passes(packet)


def test_nobody_takes_the_filter_away() -> None:
    machine, helper = usernet.pair()
    with machine, helper, pytest.raises(PermissionError):
        helper.setsockopt(socket.SOL_SOCKET, 27, 0)  # SO_DETACH_FILTER


def test_what_is_sent_to_the_machine_is_not_filtered() -> None:
    machine, helper = usernet.pair()
    with machine, helper:
        helper.send(b"anything")
        assert machine.recv(99) == b"anything"


def test_arguments_of_the_helper() -> None:
    words = usernet.arguments(7, ((8080, 80), (2222, 22)))
    assert words == [
        *("-M", "none", "-nodefaults", "-no-user-config", "-display", "none"),
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-netdev",
        "user,id=out,net=10.0.2.0/24,host=10.0.2.2,dns=10.0.2.3,dhcpstart=10.0.2.100,ipv6=off"
        ",hostfwd=tcp:127.0.0.1:8080-10.0.2.100:80,hostfwd=tcp:127.0.0.1:2222-10.0.2.100:22",
        *("-netdev", "dgram,id=guest,local.type=fd,local.str=7"),
        *("-netdev", "hubport,id=port-out,hubid=0,netdev=out"),
        *("-netdev", "hubport,id=port-guest,hubid=0,netdev=guest"),
    ]  # fmt: skip
