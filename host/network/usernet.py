"""The guest's way out where slirp4netns is missing: a second QEMU, for its user network only.

The guest's own QEMU has no network of the host.  The two are connected by a pair of sockets; what
the helper's end takes is decided by a filter in the host's kernel (`apppot.host.netfilter`).
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterable

from apppot.host.common.errors import HypervisorError
from apppot.host.confinement.sandbox import Sandbox
from apppot.host.network import filter
from apppot.host.process.spawn import Child, spawn

_SECONDS = 60.0
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_GATEWAY, _GUEST = "10.0.2.2", "10.0.2.100"
_USER = f"user,id=out,net=10.0.2.0/24,host={_GATEWAY},dns=10.0.2.3,dhcpstart={_GUEST},ipv6=off"


def pair() -> tuple[socket.socket, socket.socket]:
    """The machine's end and the helper's, which takes only what the filter lets through."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    filter.attach(theirs, filter.QEMU)
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
    request = b"\xff" * 6 + hardware + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
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
