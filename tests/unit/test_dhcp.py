"""DHCP messages as they stand on the wire."""

from __future__ import annotations

import struct

from apppot.guest.init import dhcp

COOKIE = b"\x63\x82\x53\x63"
OPTIONS = {
    1: bytes([255, 255, 254, 0]),
    3: bytes([10, 0, 0, 1, 10, 0, 0, 2]),
    6: bytes([10, 0, 0, 3, 10, 0, 0, 4]),
    26: struct.pack("!H", 1450),
    51: struct.pack("!I", 3600),
}


def encoded(options: dict[int, bytes]) -> bytes:
    return b"".join([bytes([code, len(data)]) + data for code, data in options.items()])


def test_a_lease_is_what_the_options_say() -> None:
    lease = dhcp.Lease("eth0", bytes([10, 0, 1, 7]), OPTIONS)
    assert (lease.address, lease.prefix, lease.mtu, lease.seconds) == ("10.0.1.7", 23, 1450, 3600)
    assert lease.servers == ["10.0.0.3", "10.0.0.4"]
    assert lease.routes == [("0.0.0.0", 0, "10.0.0.1")]


def test_classless_routes_replace_the_router() -> None:
    data = bytes([0, 10, 0, 0, 9, 32, 169, 254, 169, 254, 10, 0, 0, 2, 12, 172, 16, 0, 0, 0, 0])
    lease = dhcp.Lease("eth0", bytes(4), {**OPTIONS, 121: data})
    assert lease.routes == [
        ("0.0.0.0", 0, "10.0.0.9"),
        ("169.254.169.254", 32, "10.0.0.2"),
        ("172.16.0.0", 12, "0.0.0.0"),
    ]
    assert dhcp.classless(data[:-1]) == lease.routes[:-1]
    assert dhcp.classless(bytes([33, 1, 2, 3, 4, 5, 6, 7, 8, 9])) == []


def test_options_end_where_they_say() -> None:
    data = (
        b"\0\0" + encoded({6: b"ab", 3: b""}) + encoded({6: b"cd"}) + b"\xff" + encoded({1: b"x"})
    )
    assert dhcp.parse_options(data) == {6: b"abcd", 3: b""}
    assert dhcp.parse_options(b"\x06\x04ab") == {6: b"ab"}
    assert dhcp.parse_options(b"\x06") == {}


def test_a_packet_is_one_that_a_server_can_check() -> None:
    packet = dhcp.datagram(bytes([10, 0, 1, 7]), b"message")
    assert len(packet) == struct.unpack("!H", packet[2:4])[0] == 20 + 8 + 7
    assert dhcp.check_sum(packet[:20]) == 0
    assert dhcp.check_sum(b"\x45" + packet[1:19] + b"\0") != 0
    assert packet[12:20] == bytes([10, 0, 1, 7, 255, 255, 255, 255])
    assert struct.unpack("!HHH", packet[20:26]) == (68, 67, 15)


def test_only_answers_of_servers_are_read() -> None:
    message = (b"\x02" + bytes(235) + COOKIE + b"\xff").ljust(300, b"\0")
    header = b"\x46" + bytes(8) + b"\x11" + bytes(14)  # with an option: 24 bytes
    udp = struct.pack("!HHHH", 67, 68, 308, 0)
    assert dhcp.payload(header + udp + message) == message
    assert dhcp.payload(header + struct.pack("!HHHH", 67, 69, 308, 0) + message) is None
    assert dhcp.payload(header[:9] + b"\x06" + header[10:] + udp + message) is None
    assert dhcp.payload(header + udp + b"\x01" + message[1:]) is None
    assert dhcp.payload(header + udp + bytes([2])) is None
    assert dhcp.payload(b"") is None
