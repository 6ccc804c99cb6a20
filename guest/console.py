"""The agent's log: lines on the guest's console, with the time since power-on."""

from __future__ import annotations

import os
import time


def log(text: str) -> None:
    """Write one line to the console; a console that is gone is no reason to fail."""
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME)
    line = f"apppot[{seconds:.3f}] {text}\n".encode("utf-8", "backslashreplace")
    try:
        os.write(2, line)
    except OSError:
        pass
