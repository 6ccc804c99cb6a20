"""An initramfs, written without root: the kernel's cpio form."""

from __future__ import annotations

import stat
from collections.abc import Iterable

DIRECTORY = stat.S_IFDIR | 0o755
PROGRAM = stat.S_IFREG | 0o755
FILE = stat.S_IFREG | 0o644


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """An archive of (name, mode, contents)."""
    archive = bytearray()
    for number, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join([b"%08X" % field for field in fields])
        for part in (name.encode() + b"\0", data):
            archive += part
            archive += bytes(-len(archive) % 4)
    return bytes(archive)
