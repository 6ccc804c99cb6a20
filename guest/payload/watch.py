"""A process of the pot that watches followed files: a byte on stdout whenever one may have changed.

`main` gets the guest's root and the files' paths below it as arguments.  What is watched are the
directories on the way to a file, some of which may not be there yet, and the file itself.
"""

from __future__ import annotations

import os
import select
import struct
import sys

from apppot.guest import syscalls

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any

# Debian's; the pot's Python runs without its site module.
_PACKAGES = "/usr/lib/python3/dist-packages"
_EVENT = struct.Struct("iIII")


def main() -> None:
    """Watch until the agent is gone or ends this process."""
    sys.path.append(_PACKAGES)
    import pyinotify  # type: ignore[import-not-found]

    root = os.open(sys.argv[1], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    paths = [os.fsencode(word) for word in sys.argv[2:]]
    names = pyinotify.IN_CREATE | pyinotify.IN_DELETE | pyinotify.IN_MOVED_FROM
    names |= pyinotify.IN_MOVED_TO | pyinotify.IN_DELETE_SELF | pyinotify.IN_MOVE_SELF
    manager = pyinotify.WatchManager()
    poll = select.poll()
    poll.register(manager.get_fd(), select.POLLIN)
    poll.register(1, 0)  # its reader has gone
    moved = True
    while True:
        if moved:
            _watch(manager, root, paths, names | pyinotify.IN_MODIFY)
        try:
            os.write(1, b".")
        except BlockingIOError:
            pass  # it has not even taken the last ones
        if any(fd == 1 for fd, _ in poll.poll()):
            return
        # Not by pyinotify: it cannot read events of names that are no UTF-8.
        moved = bool(_seen(os.read(manager.get_fd(), 1 << 16)) & names)


def _watch(manager: Any, root: int, paths: list[bytes], mask: int) -> None:
    """Watch all that is there of each path; what is watched already stays so."""
    for path in paths:
        parts = path.split(b"/")
        for depth in range(len(parts) + 1):
            try:
                place = b"/".join(parts[:depth]) or b"."
                fd = syscalls.open_in_root(root, place, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                break
            manager.add_watch(f"/proc/self/fd/{fd}", mask)
            os.close(fd)


def _seen(data: bytes) -> int:
    """All that happened, as bits."""
    seen, at = 0, 0
    while at < len(data):
        _, mask, _, length = _EVENT.unpack_from(data, at)
        seen, at = seen | mask, at + _EVENT.size + length
    return seen
