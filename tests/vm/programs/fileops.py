"""A process that does to files what it is told: one line of JSON in, one out.

`fileops.py N` starts N such processes in the current directory and passes lines between them and
its own streams: `[process, operation, argument, …]` in; what the operation found, or the name of
its error, out.  It needs nothing but Python: it runs natively and in guests.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

_KINDS = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "none": fcntl.F_UNLCK}
_NAMES = {number: name for name, number in _KINDS.items()}
_FLOCKS = {"read": fcntl.LOCK_SH, "write": fcntl.LOCK_EX, "none": fcntl.LOCK_UN}
# struct flock of Linux on 64 bits, and commands that no Python 3.11 knows: include/uapi.
_FLOCK = "hhxxxxqqixxxx"
_OFD_GETLK, _OFD_SETLK = 36, 37
_SET_BY_UTIME = 1_500_000_000 * 10**9  # nanoseconds: times before it are no clock's


def _facts(found: os.stat_result) -> dict[str, Any]:
    """What two runs of the same operations must agree on."""
    mtime = found.st_mtime_ns
    return {
        "type": stat.S_IFMT(found.st_mode),
        "mode": stat.S_IMODE(found.st_mode),
        # A directory's depends on what the file system counts.
        "links": 0 if stat.S_ISDIR(found.st_mode) else found.st_nlink,
        "size": 0 if stat.S_ISDIR(found.st_mode) else found.st_size,
        "mtime": mtime if mtime < _SET_BY_UTIME else "now",
    }


class Worker:
    """One process's descriptors, by the number of their slot."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._base = os.open(".", os.O_RDONLY | os.O_DIRECTORY)

    def do(self, name: str, *arguments: Any) -> Any:
        """The result of one operation, or its error's name."""
        operation: Callable[..., Any] = getattr(self, f"do_{name}")
        try:
            return operation(*arguments)
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))
        except ValueError:  # a mapping of an empty file
            return "ValueError"

    def _fd(self, slot: int) -> int:
        return self._slots.get(slot, -1)

    # -- names --

    def do_stat(self, path: str) -> Any:
        return _facts(os.stat(path))

    def do_lstat(self, path: str) -> Any:
        return _facts(os.lstat(path))

    def do_list(self, path: str) -> Any:
        return sorted(os.listdir(path))

    def do_types(self, path: str) -> Any:
        return sorted(
            (entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(path)
        )

    def do_mkdir(self, path: str, mode: int) -> Any:
        os.mkdir(path, mode)

    def do_rmdir(self, path: str) -> Any:
        os.rmdir(path)

    def do_unlink(self, path: str) -> Any:
        os.unlink(path)

    def do_rename(self, old: str, new: str) -> Any:
        os.rename(old, new)

    def do_link(self, old: str, new: str) -> Any:
        os.link(old, new, follow_symlinks=False)

    def do_symlink(self, target: str, path: str) -> Any:
        os.symlink(target, path)

    def do_readlink(self, path: str) -> Any:
        return os.readlink(path)

    def do_chmod(self, path: str, mode: int) -> Any:
        os.chmod(path, mode)
        return _facts(os.stat(path))["mode"]

    def do_utime(self, path: str, nanoseconds: int) -> Any:
        os.utime(path, ns=(nanoseconds, nanoseconds))

    def do_access(self, path: str, mode: int) -> Any:
        return os.access(path, mode)

    def do_truncate(self, path: str, size: int) -> Any:
        os.truncate(path, size)

    def do_setxattr(self, path: str, name: str, value: str) -> Any:
        os.setxattr(path, f"user.{name}", value.encode())

    def do_removexattr(self, path: str, name: str) -> Any:
        os.removexattr(path, f"user.{name}")

    def do_xattrs(self, path: str) -> Any:
        names = sorted(name for name in os.listxattr(path) if name.startswith("user."))
        return {name: os.getxattr(path, name).decode() for name in names}

    def do_contents(self, path: str) -> Any:
        with open(path, "rb") as file:
            return file.read().decode("latin-1")

    def do_chdir(self, path: str) -> Any:
        if path == ".." and os.path.samestat(os.stat("."), os.fstat(self._base)):
            return "not above the base"
        os.chdir(path)
        return None

    def do_back(self) -> Any:
        os.fchdir(self._base)

    def do_here(self) -> Any:
        return sorted(os.listdir("."))

    # -- descriptors --

    def do_open(self, slot: int, path: str, flags: int, mode: int) -> Any:
        self.do_close(slot)
        self._slots[slot] = os.open(path, flags, mode)

    def do_reopen(self, slot: int, other: int, flags: int) -> Any:
        """What `other` refers to, with or without a name."""
        fd = os.open(f"/proc/self/fd/{self._fd(other)}", flags)
        self.do_close(slot)
        self._slots[slot] = fd

    def do_name(self, slot: int, path: str) -> Any:
        """Give what has none a name: what O_TMPFILE is for."""
        os.link(f"/proc/self/fd/{self._fd(slot)}", path)

    def do_close(self, slot: int) -> Any:
        if slot in self._slots:
            os.close(self._slots.pop(slot))

    def do_fstat(self, slot: int) -> Any:
        return _facts(os.fstat(self._fd(slot)))

    def do_is(self, slot: int, path: str) -> Any:
        return os.path.samestat(os.fstat(self._fd(slot)), os.stat(path))

    def do_read(self, slot: int, count: int) -> Any:
        return os.read(self._fd(slot), count).decode("latin-1")

    def do_pread(self, slot: int, count: int, offset: int) -> Any:
        return os.pread(self._fd(slot), count, offset).decode("latin-1")

    def do_write(self, slot: int, text: str, times: int) -> Any:
        written = os.write(self._fd(slot), text.encode() * times)
        return written, os.lseek(self._fd(slot), 0, os.SEEK_CUR)

    def do_pwrite(self, slot: int, text: str, times: int, offset: int) -> Any:
        return os.pwrite(self._fd(slot), text.encode() * times, offset)

    def do_lseek(self, slot: int, offset: int, whence: int) -> Any:
        return os.lseek(self._fd(slot), offset, whence)

    def do_ftruncate(self, slot: int, size: int) -> Any:
        os.ftruncate(self._fd(slot), size)

    def do_fallocate(self, slot: int, offset: int, length: int) -> Any:
        os.posix_fallocate(self._fd(slot), offset, length)

    def do_fchmod(self, slot: int, mode: int) -> Any:
        os.fchmod(self._fd(slot), mode)

    def do_fsync(self, slot: int) -> Any:
        os.fsync(self._fd(slot))

    def do_entries(self, slot: int) -> Any:
        os.fstat(self._fd(slot))  # to listdir() -1 is no descriptor
        return sorted(os.listdir(self._fd(slot)))

    def do_copy(self, source: int, target: int, count: int) -> Any:
        os.fstat(self._fd(source))  # as cp does: a guest goes by the size that it knows
        return os.copy_file_range(self._fd(source), self._fd(target), count)

    # -- mappings --

    def do_mapped(self, slot: int) -> Any:
        with mmap.mmap(self._fd(slot), 0, prot=mmap.PROT_READ) as mapped:
            return mapped[:].decode("latin-1")

    def do_map_write(self, slot: int, text: str, offset: int) -> Any:
        with mmap.mmap(self._fd(slot), 0) as mapped:
            piece = text.encode()[: max(0, len(mapped) - offset)]
            mapped[offset : offset + len(piece)] = piece
            return len(piece)

    # -- locks --

    def do_flock(self, slot: int, kind: str) -> Any:
        fcntl.flock(self._fd(slot), _FLOCKS[kind] | fcntl.LOCK_NB)

    def _record(self, slot: int, command: int, kind: str, start: int, length: int) -> Any:
        record = struct.pack(_FLOCK, _KINDS[kind], os.SEEK_SET, start, length, 0)
        answer = struct.unpack(_FLOCK, fcntl.fcntl(self._fd(slot), command, record))
        return [_NAMES[answer[0]], answer[2], answer[3]]

    def do_lock(self, slot: int, kind: str, start: int, length: int) -> Any:
        return self._record(slot, fcntl.F_SETLK, kind, start, length)

    def do_get_lock(self, slot: int, kind: str, start: int, length: int) -> Any:
        # Which of several that are in the way is told is for each system to choose.
        return self._record(slot, fcntl.F_GETLK, kind, start, length)[0] != "none"

    def do_file_lock(self, slot: int, kind: str, start: int, length: int) -> Any:
        return self._record(slot, _OFD_SETLK, kind, start, length)

    def do_get_file_lock(self, slot: int, kind: str, start: int, length: int) -> Any:
        return self._record(slot, _OFD_GETLK, kind, start, length)[0] != "none"


def _serve(lines: Iterator[bytes], answers: BinaryIO) -> None:
    worker = Worker()
    for line in lines:
        answers.write(json.dumps(worker.do(*json.loads(line))).encode() + b"\n")
        answers.flush()


def _start() -> tuple[BinaryIO, BinaryIO]:
    """A worker of its own process: where it reads, and where it answers."""
    orders, answers = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(orders[1])
        os.close(answers[0])
        with os.fdopen(orders[0], "rb") as lines, os.fdopen(answers[1], "wb") as out:
            _serve(iter(lines.readline, b""), out)
        os._exit(0)
    os.close(orders[0])
    os.close(answers[1])
    return os.fdopen(orders[1], "wb"), os.fdopen(answers[0], "rb")


def main(count: int) -> None:
    """Pass lines on until there are no more."""
    os.umask(0o022)
    # One level down, so that `..` is still a place that all share.
    os.makedirs("base", exist_ok=True)
    os.chdir("base")
    workers = [_start() for _ in range(count)]
    sys.stdout.write(f"{os.uname().release}\n")
    sys.stdout.flush()
    for line in iter(sys.stdin.buffer.readline, b""):
        number, *order = json.loads(line)
        orders, answers = workers[number]
        orders.write(json.dumps(order).encode() + b"\n")
        orders.flush()
        sys.stdout.buffer.write(answers.readline())
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
