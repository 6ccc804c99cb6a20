"""Guarding slirp4netns, the network helper: a filter on the socket on which it hears the guest.

Root in a guest may send frames with any address, and the helper would pass on to this host's
loopback what is addressed to 127.0.0.1.  It accepts the guest's connection by itself, so the socket
is the helper's: a copy of its descriptor is fetched from its process.  A filter belongs to the
socket, not to a descriptor, and stays when the copy is closed.

Loaded while the guest boots, when nothing waits: earlier it would delay the hypervisor, later the
payload.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import socket
from collections.abc import Iterator

from apppot.host.network import filter

_SECONDS = 5.0
_PIDFD_GETFD = 438


def guard(helper: int, connected: int) -> None:
    """Have the helper drop frames for this host's loopback.

    `helper` is the pid of the process that was started: slirp4netns, or what confines it.
    `connected` is a descriptor that can be read once the helper has accepted the guest's
    connection.  Raises OSError where there is none within 5 s, or where this host's kernel lets us
    have no descriptor of another process (pidfd_getfd).
    """
    # It is readable already, or is about to be: the guest has just set up its interface.
    select.select([connected], [], [], _SECONDS)
    for found in _sockets(helper):
        with found:
            kind = found.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            # Its others are the socket that it accepted this one on, and those of its API.
            if kind == socket.SOCK_SEQPACKET and not listens:
                filter.attach(found, filter.SLIRP)
                return
    raise OSError(errno.ENOTCONN, "no guest is connected to it")


def _sockets(pid: int) -> Iterator[socket.socket]:
    """The open sockets of a process and its descendants, each as a copy that the caller closes."""
    pids = [pid]
    for pid in pids:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as text:
            pids += [int(word) for word in text.read().split()]
        process = os.pidfd_open(pid)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                fd = _copied(process, int(name)) if _is_socket(f"/proc/{pid}/fd/{name}") else None
                if fd is not None:
                    yield socket.socket(fileno=fd)
        finally:
            os.close(process)


def _is_socket(path: str) -> bool:
    try:
        return os.readlink(path).startswith("socket:")
    except FileNotFoundError:  # closed since it was listed
        return False


def _copied(process: int, number: int) -> int | None:
    """A copy of descriptor `number` of a process (a pidfd); None where it has closed that."""
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, number, 0)
    if fd >= 0:
        return fd
    if ctypes.get_errno() == errno.EBADF:
        return None
    raise OSError(ctypes.get_errno(), "pidfd_getfd")
