"""Running a payload whose output is kept: a copy goes to the consoles."""

from __future__ import annotations

import os
import select
import time

from apppot.guest import syscalls
from apppot.guest.payload import process

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STREAMS = ("stdout", "stderr")
_READ_BYTES = 1 << 16


class Ended:
    """How a payload ended: wait status (None: it never ran), resource use, seconds since 1970."""

    def __init__(self, status: int | None, usage: Any, started: float, ended: float) -> None:
        self.status, self.usage = status, usage
        self.started, self.ended = started, ended


def follow(
    payload: process.Payload,
    folder: str,
    consoles: list[int],
    wake: int,
    end_the_rest: Callable[[], None],
) -> Ended:
    """Wait for the payload's end; its stdout and stderr go to files in `folder` and `consoles`.

    What it left running is ended, then what was written before is read to its end.
    """
    started = time.time()
    outputs = {}
    for name, fd in zip(STREAMS, (payload.stdout, payload.stderr)):
        assert fd is not None
        outputs[fd] = open(f"{folder}/{name}", "wb")
    if payload.stdin is not None:
        os.close(payload.stdin)
    status = usage = None
    while status is None:
        poll = select.poll()
        for fd in (wake, *outputs):
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll())
        for fd in [fd for fd in outputs if fd in ready]:
            if not _copy(fd, outputs[fd], consoles):
                outputs.pop(fd).close()
        if wake in ready:
            os.read(wake, 4096)
            status, usage = _collect(payload.pid)
    ended = time.time()
    end_the_rest()
    for fd, file in outputs.items():
        while _copy(fd, file, consoles):
            pass
        file.close()
    return Ended(status, usage, started, ended)


def _copy(fd: int, file: Any, consoles: list[int]) -> bool:
    """Pass on what can be read now; whether there was something."""
    try:
        data = os.read(fd, _READ_BYTES)
    except BlockingIOError:
        return False
    file.write(data)
    for console in consoles:
        try:
            syscalls.write_all(console, data)
        except OSError:  # a terminal that is gone; the file has all
            pass
    return bool(data)


def _collect(pid: int) -> tuple[int | None, Any]:
    """Collect every process that has ended; (status, usage) of `pid` if it was among them."""
    ended, _ = process.reap()
    return next(((status, usage) for one, status, usage in ended if one == pid), (None, None))
