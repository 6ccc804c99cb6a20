"""The agent's log: lines on the guest's consoles, with the time since power-on."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Sequence

# Terminals by path; without any, standard error, which is the kernel's preferred console.
_shown: list[str] = []


def show_on(terminals: Sequence[str]) -> None:
    """Write the log to all of these terminals from now on."""
    _shown[:] = terminals


def log(text: str) -> None:
    """Write one line to the console; a console that is gone is no reason to fail."""
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME)
    line = f"apppot[{seconds:.3f}] {text}\n".encode("utf-8", "backslashreplace")
    for path in _shown or [""]:
        try:
            _write(path, line)
        except OSError:
            pass


def _write(path: str, line: bytes) -> None:
    # Opened anew each time: the end of a job hangs its terminal up.
    fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC) if path else 2
    try:
        os.write(fd, line)
    finally:
        if path:
            os.close(fd)
