"""The guest's way out: slirp4netns, an ordinary process that speaks TCP/IP for the guest."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from apppot.host.confine import Sandbox
from apppot.host.errors import HypervisorError
from apppot.host.spawn import Child, spawn

if TYPE_CHECKING:
    import socket

READY = b"Waiting for connection"
_SOCKET, _API = "bess.sock", "api.sock"
_API_SECONDS = 5.0
_PIDFD_GETFD = 438


def start(
    program: str, sandbox: Sandbox, net_name: str, announce: Callable[[int], object]
) -> tuple[Child, int, int]:
    """Start the helper; returns it, a descriptor with what it prints, and one for `guard`.

    It is ready once READY stands there; the other speaks when the guest has connected.  Outbound
    only, the host's loopback closed.  The view's directory `net_name` gets its sockets.  `announce`
    gets its pid before it runs.
    """
    output_read, output_write = os.pipe()
    connected_read, connected_write = os.pipe()
    place = f"{sandbox.view}/{net_name}"
    argv = [*sandbox.prefix, program, "--target-type=bess", "--mtu=1500"]
    argv += ["--disable-host-loopback", f"--ready-fd={connected_write}"]
    argv += ["-a", f"{place}/{_API}", f"{place}/{_SOCKET}"]
    child = spawn(
        argv,
        output=output_write,
        keep=(connected_write,),
        before_exec=sandbox.before_exec,
        announce=announce,
    )
    os.close(output_write)
    os.close(connected_write)
    return child, output_read, connected_read


def connect(output: int, directory: str) -> socket.socket:
    """A descriptor of the helper's network, for a hypervisor that takes one.

    Waits until the helper says on `output` that it is ready.  Raises HypervisorError.
    """
    import socket

    said = b""
    while READY not in said:
        piece = os.read(output, 4096)
        if not piece:
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            raise HypervisorError(f"the network helper ended: {last[0] if last else 'silently'}")
        said += piece
    wire = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire.connect(os.path.join(directory, _SOCKET))
    return wire


def guard(helper: int, connected: int) -> None:
    """Keep what the guest's root makes up for the host's loopback from the helper.

    `helper` is the process that was started, and `connected` says when it has taken the guest's
    connection, of which it is soon.  Raises OSError where the host's kernel lets nobody at
    another process's socket.
    """
    import select
    import socket

    from apppot.host import netfilter

    select.select([connected], [], [], _API_SECONDS)
    for held in _sockets(helper):
        with held:
            kind = held.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
            listens = held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if kind == socket.SOCK_SEQPACKET and not listens:
                netfilter.attach(held, netfilter.SLIRP)
                return
    raise OSError(errno.ENOTCONN, "no guest is connected to it")


def _sockets(pid: int) -> Iterator[socket.socket]:
    """The sockets of a process and its descendants, as descriptors of ours."""
    import ctypes
    import socket

    call = ctypes.CDLL(None, use_errno=True).syscall
    pids = [pid]
    for pid in pids:
        with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as text:
            pids += [int(word) for word in text.read().split()]
        watch = os.pidfd_open(pid)
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    fd = call(_PIDFD_GETFD, watch, int(name), 0)
                    if fd < 0:
                        raise OSError(ctypes.get_errno(), "pidfd_getfd")
                    yield socket.socket(fileno=fd)
        finally:
            os.close(watch)


def forward(directory: str, host_port: int, guest_port: int) -> None:
    """Forward a TCP port of the host's loopback to the guest.  Raises HypervisorError."""
    request = {
        "execute": "add_hostfwd",
        "arguments": {
            "proto": "tcp",
            "host_addr": "127.0.0.1",
            "host_port": host_port,
            "guest_port": guest_port,
        },
    }
    try:
        answer = _ask(os.path.join(directory, _API), request)
    except (OSError, ValueError) as error:
        raise HypervisorError(f"the network helper takes no orders: {error}") from error
    if "error" in answer:
        raise HypervisorError(
            f"port {host_port} cannot be forwarded: {answer['error']}",
            "choose another port of the host: this one may be in use, or below 1024",
        )


def _ask(path: str, request: object) -> dict[str, object]:
    import socket

    with socket.socket(socket.AF_UNIX) as api:
        api.settimeout(_API_SECONDS)
        _connect(api, path)
        api.sendall(json.dumps(request).encode())
        api.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := api.recv(4096):
            answer += piece
    value: dict[str, object] = json.loads(answer)
    return value


def _connect(api: object, path: str) -> None:
    deadline = time.monotonic() + _API_SECONDS
    while True:
        try:
            api.connect(path)  # type: ignore[attr-defined]
            return
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
