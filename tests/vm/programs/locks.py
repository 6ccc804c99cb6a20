"""Hold a lock: `locks.py KIND MODE now|wait`, of kind flock, record or file.

Says "held" and this kernel's release, or "busy", or the name of an error; lets go when a line
comes, and then says "free".  While it waits, another process of the same machine says "alive" once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import sys

_SETLK = {"record": (fcntl.F_SETLK, fcntl.F_SETLKW), "file": (37, 38)}  # include/uapi: OFD locks
_TYPES = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "none": fcntl.F_UNLCK}
_FLOCKS = {"read": fcntl.LOCK_SH, "write": fcntl.LOCK_EX, "none": fcntl.LOCK_UN}


class Interrupted(Exception):
    """A signal came while it waited."""


def _set(fd: int, kind: str, mode: str, wait: bool) -> None:
    if kind == "flock":
        fcntl.flock(fd, _FLOCKS[mode] | (0 if wait else fcntl.LOCK_NB))
    else:
        record = struct.pack("hhxxxxqqixxxx", _TYPES[mode], os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(fd, _SETLK[kind][wait], record)


def _interrupt(_number: int, _frame: object) -> None:
    raise Interrupted


def _say(text: str) -> None:
    print(text, flush=True)


def main(kind: str, mode: str, when: str) -> None:
    """See above."""
    fd = os.open("lock", os.O_RDWR | os.O_CREAT, 0o666)
    signal.signal(signal.SIGUSR1, _interrupt)
    if when == "wait" and os.fork() == 0:
        _say("alive")
        os._exit(0)
    try:
        _set(fd, kind, mode, when == "wait")
    except Interrupted:
        _say("interrupted")
        return
    except OSError as error:
        busy = error.errno in (errno.EAGAIN, errno.EACCES)
        _say("busy" if busy else errno.errorcode[error.errno or 0])
        return
    _say(f"held {os.uname().release}")
    sys.stdin.readline()
    _set(fd, kind, "none", False)
    _say("free")
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
