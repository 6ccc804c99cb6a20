"""The guest's way out where slirp4netns is missing: a second QEMU, for its user network only.

The guest's own QEMU has no network of the host.  The two are connected by a pair of sockets; what
the helper's end takes is decided by a filter in the host's kernel, which neither can remove: QEMU
would answer for the host's loopback at the gateway's address, and has no option not to.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterable

from apppot.host.confine import Sandbox
from apppot.host.errors import HypervisorError
from apppot.host.spawn import Child, spawn

_SECONDS = 60.0
_SO_ATTACH_FILTER, _SO_LOCK_FILTER = 26, 44
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_GATEWAY, _GUEST = "10.0.2.2", "10.0.2.100"
_USER = f"user,id=out,net=10.0.2.0/24,host={_GATEWAY},dns=10.0.2.3,dhcpstart={_GUEST},ipv6=off"

# Classic BPF: (code, jump if true, jump if false, operand), with names for where jumps go.
_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_LOAD_HALF_AT_X, _LOAD_BYTE_AT_X, _X_FROM_HEADER = 0x48, 0x50, 0xB1
_AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x54, 0x15, 0x35, 0x45, 0x06
_NEXT = ""
_Step = tuple[int, str, str, int]
_ARP, _IP, _TCP, _UDP, _DNS_PORT = 0x0806, 0x0800, 6, 17, 53
_SYN, _ACK = 0x02, 0x10


def _address(text: str) -> int:
    return int.from_bytes(socket.inet_aton(text), "big")


# Offsets in an Ethernet frame: type 12; of IPv4: header length 14, fragment 20, protocol 23,
# destination 30; behind it, from 14 + X: destination port 2, TCP's flags 13.
_FILTER: dict[str, list[_Step]] = {
    "start": [
        (_LOAD_HALF, _NEXT, _NEXT, 12),
        (_EQUAL, "take", _NEXT, _ARP),
        (_EQUAL, _NEXT, "drop", _IP),
        # This host itself in other words, and all hosts at once.
        (_LOAD_WORD, _NEXT, _NEXT, 30),
        (_AT_LEAST, "drop", _NEXT, _address("224.0.0.0")),
        (_AND, _NEXT, _NEXT, _address("255.0.0.0")),
        (_EQUAL, "drop", _NEXT, _address("127.0.0.0")),
        (_EQUAL, "drop", _NEXT, 0),
        (_LOAD_WORD, _NEXT, _NEXT, 30),
        (_AND, _NEXT, _NEXT, _address("255.255.255.0")),
        (_EQUAL, _NEXT, "take", _address("10.0.2.0")),
        # The helper's own addresses: of parts of packets, nothing could be said.
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
    "take": [(_RETURN, _NEXT, _NEXT, 0xFFFFFFFF)],
    "drop": [(_RETURN, _NEXT, _NEXT, 0)],
}


def program() -> bytes:
    """The filter as the kernel takes it (struct sock_filter, 8 bytes each)."""
    places: dict[str, int] = {}
    steps: list[_Step] = []
    for name, block in _FILTER.items():
        places[name] = len(steps)
        steps += block
    packed = b""
    for at, (code, true, false, operand) in enumerate(steps, 1):
        jumps = [places[name] - at if name else 0 for name in (true, false)]
        packed += struct.pack("=HBBI", code, *jumps, operand)
    return packed


def pair() -> tuple[socket.socket, socket.socket]:
    """The machine's end and the helper's, which takes only what the filter lets through."""
    import ctypes

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    steps = program()
    memory = ctypes.create_string_buffer(steps, len(steps))
    value = struct.pack("@HP", len(steps) // 8, ctypes.addressof(memory))
    theirs.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, value)
    theirs.setsockopt(socket.SOL_SOCKET, _SO_LOCK_FILTER, 1)
    return ours, theirs


def arguments(wire: int, forwards: Iterable[tuple[int, int]]) -> list[str]:
    """The helper's arguments: no machine, and a hub for the two that it connects."""
    user = _USER + "".join(
        f",hostfwd=tcp:127.0.0.1:{host}-{_GUEST}:{guest}" for host, guest in forwards
    )
    words = ["-M", "none", "-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-sandbox", _SANDBOX, "-netdev", user]
    words += ["-netdev", f"dgram,id=guest,local.type=fd,local.str={wire}"]
    for name in ("out", "guest"):
        words += ["-netdev", f"hubport,id=port-{name},hubid=0,netdev={name}"]
    return words


def start(
    qemu: str,
    sandbox: Sandbox,
    forwards: Iterable[tuple[int, int]],
    announce: Callable[[int], object],
) -> tuple[Child, int, socket.socket]:
    """Start the helper; returns it, a descriptor with what it prints, and the machine's end.

    It is ready then, with all ports forwarded.  Raises HypervisorError where it is not.
    """
    output_read, output_write = os.pipe()
    ours, theirs = pair()
    with theirs:
        child = spawn(
            [*sandbox.prefix, qemu, *arguments(theirs.fileno(), forwards)],
            output=output_write,
            keep=(theirs.fileno(),),
            before_exec=sandbox.before_exec,
            announce=announce,
        )
    os.close(output_write)
    try:
        _await_answer(ours, output_read)
    except HypervisorError:
        child.kill()
        os.close(output_read)
        ours.close()
        raise
    return child, output_read, ours


def _await_answer(wire: socket.socket, output: int) -> None:
    """Ask who has the gateway's address, and wait for the answer (ARP)."""
    hardware = b"\x52\x54\0\x12\x34\x57"
    request = b"\xff" * 6 + hardware + struct.pack("!HHHBBH", _ARP, 1, _IP, 6, 4, 1)
    request += hardware + bytes(4) + bytes(6) + socket.inet_aton(_GATEWAY)
    wire.send(request)
    said, ended = b"", False
    while not ended:
        ready, _, _ = select.select([wire.fileno(), output], [], [], _SECONDS)
        if wire.fileno() in ready and _answers(wire):
            return
        # What it warns of comes before its end.
        piece = os.read(output, 4096) if output in ready else b""
        said, ended = said + piece, not piece
    last = said.decode(errors="replace").strip().splitlines()[-1:] or ["it does not answer"]
    _, refused, rule = last[0].partition("host forwarding rule ")
    if refused:
        raise HypervisorError(
            f"a port cannot be forwarded: {rule}",
            "choose another port of the host: this one may be in use, or below 1024",
        )
    raise HypervisorError(f"QEMU's user network: {last[0]}", "install slirp4netns")


def _answers(wire: socket.socket) -> bool:
    try:
        return bool(wire.recv(2048))
    except ConnectionResetError:  # it ended without having read the question
        return False
