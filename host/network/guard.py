"""Guarding slirp4netns from what root in a guest makes up: the filter on its socket.

Loaded while the guest boots, since the way to the payload leads through it.
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
    """Keep what the guest's root makes up for the host's loopback from the helper.

    `helper` is the process that was started, and `connected` says when it has taken the guest's
    connection, of which it is soon.  Raises OSError where the host's kernel lets nobody at
    another process's socket.
    """
    select.select([connected], [], [], _SECONDS)
    for held in _sockets(helper):
        with held:
            kind = held.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            listens = held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if kind == socket.SOCK_SEQPACKET and not listens:
                filter.attach(held, filter.SLIRP)
                return
    raise OSError(errno.ENOTCONN, "no guest is connected to it")


def _sockets(pid: int) -> Iterator[socket.socket]:
    """The sockets of a process and its descendants, as descriptors of ours."""
    pids = [pid]
    for pid in pids:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as text:
            pids += [int(word) for word in text.read().split()]
        watch = os.pidfd_open(pid)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                fd = _taken(watch, int(name)) if _is_socket(f"/proc/{pid}/fd/{name}") else None
                if fd is not None:
                    yield socket.socket(fileno=fd)
        finally:
            os.close(watch)


def _is_socket(path: str) -> bool:
    try:
        return os.readlink(path).startswith("socket:")
    except FileNotFoundError:  # closed since it was listed
        return False


def _taken(process: int, number: int) -> int | None:
    """A descriptor of ours for one of a process's; None where it has closed that."""
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, number, 0)
    if fd >= 0:
        return fd
    if ctypes.get_errno() == errno.EBADF:
        return None
    raise OSError(ctypes.get_errno(), "pidfd_getfd")
