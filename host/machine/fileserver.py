"""The guest's directories by virtiofs: a virtiofsd, an ordinary process, for each of them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

from apppot.host.confinement.sandbox import TEMPORARY, VIEW, Sandbox, Shown
from apppot.host.process.spawn import Child, spawn

_ALL_IDS = 0xFFFFFFFF
# Nothing that the host's side changes is seen late in the guest, as with 9p.
_LIVE = ("--cache=never", "--allow-mmap")


def arguments(directory: str, writable: bool, uid: int, gid: int) -> list[str]:
    """The server's arguments but for its descriptor.

    Whoever makes a file in the guest, it belongs to the caller: this process can be nobody else.
    """
    words = ["--shared-dir", directory, *_LIVE, "--sandbox=none", "--no-announce-submounts"]
    words += ["--rlimit-nofile=0", "--log-level=warn"]
    words += ["--translate-uid", f"squash-guest:0:{uid}:{_ALL_IDS}"]
    words += ["--translate-gid", f"squash-guest:0:{gid}:{_ALL_IDS}"]
    return words if writable else [*words, "--readonly"]


def start(
    program: str,
    sandbox: Sandbox,
    item: Shown,
    place: str,
    output: int,
    announce: Callable[[int], object],
) -> tuple[Child, socket.socket]:
    """Start the server of a shown directory; returns it and a descriptor connected to it.

    `place` is a private directory, `output` gets what the server says, `announce` its pid before
    it runs.  It ends when the connection does.
    """
    _, _, file = item.name.partition("/")
    source = os.path.dirname(item.source) if file else item.source
    directory = f"{VIEW}/{item.tag}" if sandbox.view == VIEW else source
    path = os.path.join(place, item.tag)
    wire = socket.socket(socket.AF_UNIX)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        wire.connect(path)
        os.unlink(path)
        words = arguments(directory, item.writable, os.getuid(), os.getgid())
        child = spawn(
            [*sandbox.prefix, program, "--fd", str(listener.fileno()), *words],
            output=output,
            keep=(listener.fileno(),),
            env={"PATH": "/usr/bin:/bin", "HOME": TEMPORARY, "TMPDIR": TEMPORARY},
            before_exec=sandbox.before_exec,
            announce=announce,
        )
    return child, wire
