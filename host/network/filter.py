"""What a network helper takes from a machine, decided in the host's kernel.

The guest's root may send any frame.  Helpers send what is addressed to 127.0.0.1 there, on the
host: a filter on the helper's socket (classic BPF) drops such frames before it sees them, and
cannot be removed from it.
"""

from __future__ import annotations

import array
import socket
import struct

_SO_ATTACH_FILTER, _SO_LOCK_FILTER = 26, 44
_GATEWAY = "10.0.2.2"

# Classic BPF: (code, jump if true, jump if false, operand), with names for where jumps go.
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_LOAD_HALF_AT_X, _LOAD_BYTE_AT_X, _X_FROM_HEADER = 0x48, 0x50, 0xB1
_AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x54, 0x15, 0x35, 0x45, 0x06
_NEXT = ""
_Step = tuple[int, str, str, int]
Blocks = dict[str, list[_Step]]
_ARP, _IP, _TCP, _UDP, _DNS_PORT = 0x0806, 0x0800, 6, 17, 53
_SYN, _ACK = 0x02, 0x10


def _address(text: str) -> int:
    return int.from_bytes(socket.inet_aton(text), "big")


# Offsets in an Ethernet frame: type 12; of IPv4: header length 14, fragment 20, protocol 23,
# destination 30; behind it, from 14 + X: destination port 2, TCP's flags 13.
_START: list[_Step] = [
    (_LOAD_HALF, _NEXT, _NEXT, 12),
    (_EQUAL, "take", _NEXT, _ARP),
    (_EQUAL, _NEXT, "drop", _IP),
    # This host itself in other words, and all hosts at once.
    (_LOAD_WORD, _NEXT, _NEXT, 30),
    (_AT_LEAST, "drop", _NEXT, _address("224.0.0.0")),
    (_AND, _NEXT, _NEXT, _address("255.0.0.0")),
    (_EQUAL, "drop", _NEXT, _address("127.0.0.0")),
    (_EQUAL, "drop", _NEXT, 0),
]
_ENDS: Blocks = {
    "take": [(_RETURN, _NEXT, _NEXT, 0xFFFFFFFF)],
    "drop": [(_RETURN, _NEXT, _NEXT, 0)],
}
# Told to close the host's loopback, it closes the gateway's address only.
SLIRP: Blocks = {"start": _START, **_ENDS}
# It answers for the loopback at addresses of its own network, and has no option not to.
QEMU: Blocks = {
    "start": [
        *_START,
        (_LOAD_WORD, _NEXT, _NEXT, 30),
        (_AND, _NEXT, _NEXT, _address("255.255.255.0")),
        (_EQUAL, _NEXT, "take", _address("10.0.2.0")),
        # Of parts of packets, nothing could be said.
        (_LOAD_HALF, _NEXT, _NEXT, 20),
        (_ANY_BIT, "drop", _NEXT, 0x3FFF),
        (_X_FROM_HEADER, _NEXT, _NEXT, 14),
        (_LOAD_WORD, _NEXT, _NEXT, 30),
        (_EQUAL, "names", _NEXT, _address("10.0.2.3")),
        (_EQUAL, _NEXT, "drop", _address(_GATEWAY)),
        # Answers to connections that come in, but none that goes out.
        (_LOAD_BYTE, _NEXT, _NEXT, 23),
        (_EQUAL, _NEXT, "drop", _TCP),
        (_LOAD_BYTE_AT_X, _NEXT, _NEXT, 27),
        (_AND, _NEXT, _NEXT, _SYN | _ACK),
        (_EQUAL, "drop", "take", _SYN),
    ],
    "names": [
        (_LOAD_BYTE, _NEXT, _NEXT, 23),
        (_EQUAL, "port", _NEXT, _UDP),
        (_EQUAL, "port", "drop", _TCP),
    ],
    "port": [
        (_LOAD_HALF_AT_X, _NEXT, _NEXT, 16),
        (_EQUAL, "take", "drop", _DNS_PORT),
    ],
    **_ENDS,
}


def program(blocks: Blocks) -> bytes:
    """A filter as the kernel takes it (struct sock_filter, 8 bytes each)."""
    places: dict[str, int] = {}
    steps: list[_Step] = []
    for name, block in blocks.items():
        places[name] = len(steps)
        steps += block
    packed = b""
    for at, (code, true, false, operand) in enumerate(steps, 1):
        jumps = [places[name] - at if name else 0 for name in (true, false)]
        packed += struct.pack("=HBBI", code, *jumps, operand)
    return packed


def attach(helper: socket.socket, blocks: Blocks) -> None:
    """Have the helper's socket take only what the filter lets through, for good.

    Raises OSError, also where it has a filter already.
    """
    steps = array.array("B", program(blocks))
    place, length = steps.buffer_info()
    value = struct.pack("@HP", length // 8, place)
    helper.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, value)
    helper.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
