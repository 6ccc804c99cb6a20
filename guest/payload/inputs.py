"""The job directory as a copy: where it lies in the guest, and its files from the config drive.

Off the boot path of a guest whose job directory is shared.  It lies beside the layer that the
guest writes to, not in it, so that it gets into no session's changes.
"""

from __future__ import annotations

import os

from apppot.guest import syscalls
from apppot.guest.merge import scratch
from apppot.guest.merge.root import ROOT, WORK
from apppot.guest.protocol.drive import BLOCK, JOB_FILES
from apppot.guest.protocol.job import JOB_DIR

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from apppot.guest.protocol.job import Job

PLACE = WORK + "/job"
_ROOT = PLACE.encode() + b"/"

PIECE_BYTES = 1 << 20
_ZEROS = bytes(PIECE_BYTES)
# What a member of the archive counts besides its bytes.
_MEMBER = 16 << 10
_FILE, _HARD_LINK, _LINK, _DIRECTORY, _RECORDS = b"0", b"1", b"2", b"5", b"x"
_NO_SPACE = 28
# Memory that no copy takes: without it nothing could run.
_RESERVE = 16 << 20


def mount(job: Job, in_place: bool) -> None:
    """Make the job directory, empty but for the points that binds in it are mounted on."""
    os.mkdir(PLACE)
    if in_place:
        syscalls.mount("job", PLACE, "tmpfs", syscalls.MS_NOATIME, "mode=0755,size=90%")
    else:
        below = f"{scratch.POINT}/job"
        _remove(below)  # a session that was killed
        os.mkdir(below)
        syscalls.mount(below, PLACE, None, syscalls.MS_BIND)
    os.chown(PLACE, job.uid, job.gid)
    for bound in job.mounts:
        inside = os.path.relpath(bound.target, JOB_DIR.encode())
        if inside != b"." and inside.split(b"/")[0] != b"..":
            _mount_point(os.path.join(PLACE.encode(), inside), bool(bound.name))
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    syscalls.mount(PLACE, ROOT + JOB_DIR, None, syscalls.MS_BIND)
    syscalls.mount("none", ROOT + JOB_DIR, None, syscalls.MS_BIND | syscalls.MS_REMOUNT | flags)


def _mount_point(path: bytes, is_file: bool) -> None:
    os.makedirs(os.path.dirname(path) if is_file else path, exist_ok=True)
    if is_file:
        open(path, "ab").close()


def remove() -> None:
    """Take the files off a session's disk."""
    _remove(f"{scratch.POINT}/job")


def _remove(path: str) -> None:
    if not os.path.isdir(path):
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _remove(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(path)


def unpack(device: str, job: Job, beat: Callable[[], object]) -> None:
    """Put the files on the config drive into the job directory; they belong to the caller.

    Calls `beat` between pieces.  Raises OSError, which says so when the guest has no room.
    """
    with open(device, "rb", buffering=PIECE_BYTES) as drive:
        archive = _Archive(drive, job, beat)
        try:
            while archive.member():
                pass
        except OSError as error:
            if error.errno != _NO_SPACE:
                raise
            raise OSError(
                "the job directory's files do not fit into the guest: more memory (--mem), a disk "
                "(--scratch), or fewer files (--input)"
            ) from error
        archive.finish()


class _Archive:
    """The files on a config drive, on their way into the job directory."""

    def __init__(self, drive: BinaryIO, job: Job, beat: Callable[[], object]) -> None:
        self._drive, self._beat = drive, beat
        self._unheard = 0  # bytes of work since the last beat
        self._owner = job.uid, job.gid
        self._folders: list[tuple[bytes, int, int]] = []
        # A disk says by itself when it is full; memory that is full would end the guest.
        self._room = _memory() - _RESERVE if job.scratch is None else None

    def member(self) -> bool:
        """Put one member of the archive in its place; False at the archive's end."""
        header, records = self._exactly(BLOCK), {}
        if header[156:157] == _RECORDS:
            records = _records(self._contents(_number(header, 124, 12)))
            header = self._exactly(BLOCK)
        if not any(header):
            return False
        self._worked(_MEMBER)
        kind, size = header[156:157], int(records.get(b"size", _number(header, 124, 12)))
        name = records.get(b"path") or header[:100].rstrip(b"\0")
        if not name.startswith(JOB_FILES):
            self._contents(size)
            return True
        path = _ROOT + name[len(JOB_FILES) :].rstrip(b"/")
        target = records.get(b"linkpath") or header[157:257].rstrip(b"\0")
        mode, mtime = _number(header, 100, 8), _time(records[b"mtime"])
        if kind == _HARD_LINK:
            os.link(_ROOT + target[len(JOB_FILES) :], path)
        elif kind == _LINK:
            os.symlink(target, path)
            os.lchown(path, *self._owner)
            os.utime(path, ns=(mtime, mtime), follow_symlinks=False)
        elif kind == _DIRECTORY:
            self._directory(path, mode, mtime)
        elif kind == _FILE:
            self._file(path, size)
            os.chown(path, *self._owner)
            os.chmod(path, mode)
            os.utime(path, ns=(mtime, mtime))
        return True

    def finish(self) -> None:
        """Give directories their modes and times, which what comes into them would change."""
        for path, mode, mtime in reversed(self._folders):
            os.chmod(path, mode)
            os.utime(path, ns=(mtime, mtime))

    def _directory(self, path: bytes, mode: int, mtime: int) -> None:
        if not os.path.isdir(path):  # as the mount point of a bind is
            os.mkdir(path, 0o700)
        os.chown(path, *self._owner)
        self._folders.append((path, mode, mtime))

    def _file(self, path: bytes, size: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            left = size
            while left:
                piece = self._exactly(min(left, PIECE_BYTES))
                left -= len(piece)
                if size > PIECE_BYTES and piece == _ZEROS[: len(piece)]:
                    os.lseek(fd, len(piece), os.SEEK_CUR)
                else:
                    self._take_room(len(piece))
                    syscalls.write_all(fd, piece)
                    self._worked(len(piece))
            if size > PIECE_BYTES:  # it may end in a hole
                os.ftruncate(fd, size)
        finally:
            os.close(fd)
        self._exactly(-size % BLOCK)

    def _worked(self, count: int) -> None:
        self._unheard += count
        if self._unheard >= PIECE_BYTES:
            self._unheard = 0
            self._beat()
            # What is read once need not stay in memory.
            drive = self._drive
            os.posix_fadvise(drive.fileno(), 0, drive.tell(), os.POSIX_FADV_DONTNEED)

    def _take_room(self, size: int) -> None:
        if self._room is not None:
            self._room -= size
            if self._room < 0:
                raise OSError(_NO_SPACE, "no memory left")

    def _contents(self, size: int) -> bytes:
        """The contents of a member, without what fills its last block."""
        return self._exactly(size + -size % BLOCK)[:size]

    def _exactly(self, size: int) -> bytes:
        data = self._drive.read(size)
        if len(data) != size:
            raise OSError("the config drive ends in the middle of a file")
        return data


def _memory() -> int:
    """Bytes of memory that are available."""
    with open("/proc/meminfo", "rb") as text:
        for line in text:
            if line.startswith(b"MemAvailable:"):
                return int(line.split()[1]) << 10
    raise OSError("the kernel does not say how much memory there is")


def _number(header: bytes, start: int, length: int) -> int:
    return int(header[start : start + length].rstrip(b"\0 ") or b"0", 8)


def _time(text: bytes) -> int:
    seconds, _, rest = text.partition(b".")
    return int(seconds) * 10**9 + int(rest or b"0")


def _records(data: bytes) -> dict[bytes, bytes]:
    """The `LENGTH NAME=VALUE` lines of a pax header."""
    found = {}
    while data:
        length, _, _ = data.partition(b" ")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        found[name] = value
        data = data[int(length) :]
    return found
