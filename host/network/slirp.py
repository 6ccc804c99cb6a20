"""The guest's way out: slirp4netns, an ordinary process that speaks TCP/IP for the guest."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from apppot.host.common.errors import HypervisorError
from apppot.host.confinement.sandbox import Sandbox
from apppot.host.process.spawn import Child, spawn

if TYPE_CHECKING:
    import socket

READY = b"Waiting for connection"
_SOCKET, _API = "bess.sock", "api.sock"
_API_SECONDS = 5.0


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
