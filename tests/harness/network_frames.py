"""Ethernet frames as the guest's root can make them up."""

from __future__ import annotations

import socket
import struct

GUEST, GATEWAY = socket.inet_aton("10.0.2.100"), socket.inet_aton("10.0.2.2")
HARDWARE = b"\x52\x54\0\x12\x34\x56"


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def syn(address: str, port: int) -> bytes:
    """The frame that asks an address for a connection."""
    target = socket.inet_aton(address)
    segment = struct.pack("!HHIIBBHHH", 4000, port, 1, 0, 5 << 4, 2, 8192, 0, 0)
    pseudo = GUEST + target + struct.pack("!HH", 6, len(segment))
    segment = segment[:16] + struct.pack("!H", checksum(pseudo + segment)) + segment[18:]
    head = struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, 6, 0) + GUEST + target
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return b"\x52\x55\x0a\0\2\2" + HARDWARE + b"\x08\0" + head + segment


def ask(wire: socket.socket) -> None:
    """Ask who has the gateway's address: what came before is done when the answer comes."""
    asked = struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
    wire.settimeout(60)
    wire.send(b"\xff" * 6 + HARDWARE + asked + HARDWARE + GUEST + bytes(6) + GATEWAY)
    while wire.recv(2048)[12:14] != b"\x08\x06":
        pass
