"""Carries the frames of one Xen guest between its interface in dom0 and the network helper.

    xennet.py WIRE INTERFACE

A program of its own, by path and with the standard library only.  The interface goes into a
network namespace of this process, where nothing has an address or listens: of the guest's frames
the host's own network sees none.  It says READY on stdout, and ends when either end is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import sys
from collections.abc import Sequence

READY = "ready"
_CLONE_NEWNET = 0x40000000
_SETLINK, _NET_NS_FD, _REQUEST_AND_ANSWER = 19, 28, 5
_NO_IPV6 = "/proc/sys/net/ipv6/conf/default/disable_ipv6"
_SET_FLAGS, _UP, _NO_ARP = 0x8914, 0x1, 0x80
_ALL, _PACKET, _VNET_HEADER, _IGNORE_OUTGOING = 3, 263, 15, 23
# struct virtio_net_hdr: flags, kind of segments, two lengths, where a checksum starts and stands.
_HEADER = struct.Struct("=BBHHHH")
_NEEDS_CHECKSUM = 1
_LARGEST = 1 << 16
_NOBODY = 65534
# The guest takes no more, or not this: an Ethernet may drop it.
_DROPPED = (errno.ENOBUFS, errno.EMSGSIZE, errno.EINVAL)


def main(argv: Sequence[str]) -> int:
    wire, interface = socket.socket(fileno=int(argv[0])), argv[1]
    move_here(interface)
    with wire, opened(interface) as link:
        drop_rights()
        print(READY, flush=True)
        os.close(1)
        carry(wire, link)
    return 0


def move_here(interface: str) -> None:
    """Enter a new network namespace and take the interface along."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as outside:
        index = socket.if_nametoindex(interface)
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "a network namespace")
        # The kernel would greet its neighbours.
        with contextlib.suppress(FileNotFoundError), open(_NO_IPV6, "w") as file:
            file.write("1")
        with open("/proc/self/ns/net") as here:
            # struct ifinfomsg, an attribute.
            order = struct.pack("=BxHiIIHHI", 0, 0, index, 0, 0, 8, _NET_NS_FD, here.fileno())
            header = struct.pack("=IHHII", 16 + len(order), _SETLINK, _REQUEST_AND_ANSWER, 1, 0)
            outside.send(header + order)
            (result,) = struct.unpack_from("=i", outside.recv(4096), 16)
    if result:
        raise OSError(-result, f"{interface}: {os.strerror(-result)}")


def opened(interface: str) -> socket.socket:
    """What takes and gives whole frames of the interface, each behind a virtio_net_hdr."""
    link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    for option in (_VNET_HEADER, _IGNORE_OUTGOING):
        link.setsockopt(_PACKET, option, 1)
    # Before the socket is bound, which else would give an error first: the interface is down.
    name = interface.encode("ascii")
    fcntl.ioctl(link, _SET_FLAGS, struct.pack("=16sH22x", name, _UP | _NO_ARP))
    link.bind((interface, _ALL))
    return link


def drop_rights() -> None:
    """Have no more rights than anybody: a guest decides what comes."""
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def carry(wire: socket.socket, link: socket.socket) -> None:
    """Pass frames both ways, till one end is gone.

    An end that takes no more makes the other one wait, whose kernel drops what becomes too much.
    """
    to_wire = to_link = b""
    for end in (wire, link):
        end.setblocking(False)
    while True:
        poll = select.poll()
        poll.register(wire, _events(to_wire, to_link))
        poll.register(link, _events(to_link, to_wire))
        if any(events & select.POLLHUP for _, events in poll.poll()):
            return
        try:
            if not to_wire and (taken := _received(link)):
                to_wire = completed(taken)
            if not to_link and (taken := _received(wire)):
                to_link = bytes(_HEADER.size) + taken
            if to_wire and _sent(wire, to_wire):
                to_wire = b""
            if to_link and _sent(link, to_link):
                to_link = b""
        except OSError:  # the interface is gone
            return


def _events(waiting: bytes, other_way: bytes) -> int:
    """What to wait for at an end, with what waits to be sent there, and from there."""
    return (select.POLLOUT if waiting else 0) | (0 if other_way else select.POLLIN)


def _received(end: socket.socket) -> bytes:
    """A frame, or b"" where there is none."""
    try:
        return end.recv(_LARGEST)
    except BlockingIOError:
        return b""


def _sent(end: socket.socket, frame: bytes) -> bool:
    """Whether the frame need not be sent again."""
    try:
        end.send(frame)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _DROPPED:
            raise
    return True


def completed(taken: bytes) -> bytes:
    """The frame behind a header, with the checksum that the guest has left to its interface.

    Where that belongs stands the sum of the addresses and so on (the pseudo header).
    """
    flags, *_, start, offset = _HEADER.unpack_from(taken)
    frame = taken[_HEADER.size :]
    if not flags & _NEEDS_CHECKSUM:
        return frame
    # The ones' complement sum of 16-bit words is the remainder of the number that they make.
    data = frame[start:] + bytes((len(frame) - start) % 2)
    checksum = 0xFFFF - int.from_bytes(data, "big") % 0xFFFF
    place = start + offset
    return frame[:place] + checksum.to_bytes(2, "big") + frame[place + 2 :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
