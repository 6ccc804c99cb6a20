"""Which host this is, and which boot of it."""

from __future__ import annotations

import os


def host_name() -> str:
    return os.uname().nodename  # a home directory is shared between hosts


def boot_id() -> str:
    """What names this boot of the host."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as text:
            return text.read().strip()
    except OSError:
        return "unknown"
