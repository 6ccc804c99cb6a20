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

_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)
_FILE, _HARD_LINK, _LINK, _DIRECTORY, _RECORDS = b"0", b"1", b"2", b"5", b"x"
_NO_SPACE = 28


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
    folders: list[tuple[bytes, int, int]] = []
    with open(device, "rb", buffering=_PIECE) as drive:
        try:
            while _member(drive, job, folders, beat):
                beat()
        except OSError as error:
            if error.errno != _NO_SPACE:
                raise
            raise OSError(
                "the job directory's files do not fit into the guest: more memory (--mem), a disk "
                "(--scratch), or fewer files (--input)"
            ) from error
    # When all that is in them has come: it changes their times.
    for path, mode, mtime in reversed(folders):
        os.chmod(path, mode)
        os.utime(path, ns=(mtime, mtime))


def _member(
    drive: BinaryIO,
    job: Job,
    folders: list[tuple[bytes, int, int]],
    beat: Callable[[], object],
) -> bool:
    """Put one member of the archive in its place; False at the archive's end."""
    header, records = _header(drive), {}
    if header[156:157] == _RECORDS:
        records = _records(_read(drive, _number(header, 124, 12)))
        header = _header(drive)
    if not any(header):
        return False
    kind, size = header[156:157], int(records.get(b"size", _number(header, 124, 12)))
    name = records.get(b"path") or header[:100].rstrip(b"\0")
    if not name.startswith(JOB_FILES):
        _read(drive, size)
        return True
    root = PLACE.encode() + b"/"
    path = root + name[len(JOB_FILES) :].rstrip(b"/")
    target = records.get(b"linkpath") or header[157:257].rstrip(b"\0")
    mode, mtime = _number(header, 100, 8), _time(records[b"mtime"])
    if kind == _HARD_LINK:
        os.link(root + target[len(JOB_FILES) :], path)
        return True
    if kind == _DIRECTORY:
        if not os.path.isdir(path):
            os.mkdir(path, 0o700)
        folders.append((path, mode, mtime))
        os.chown(path, job.uid, job.gid)
    elif kind == _LINK:
        os.symlink(target, path)
        os.lchown(path, job.uid, job.gid)
        os.utime(path, ns=(mtime, mtime), follow_symlinks=False)
    elif kind == _FILE:
        _file(drive, path, size, beat)
        os.chown(path, job.uid, job.gid)
        os.chmod(path, mode)
        os.utime(path, ns=(mtime, mtime))
    return True


def _file(drive: BinaryIO, path: bytes, size: int, beat: Callable[[], object]) -> None:
    # A bind's mount point may be there already.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        left = size
        while left:
            piece = _exactly(drive, min(left, _PIECE))
            left -= len(piece)
            if piece == _ZEROS[: len(piece)]:
                os.lseek(fd, len(piece), os.SEEK_CUR)
            else:
                _write(fd, piece)
                beat()
            os.posix_fadvise(drive.fileno(), 0, drive.tell(), os.POSIX_FADV_DONTNEED)
        os.ftruncate(fd, size)
    finally:
        os.close(fd)
    _exactly(drive, -size % BLOCK)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _header(drive: BinaryIO) -> bytes:
    return _exactly(drive, BLOCK)


def _read(drive: BinaryIO, size: int) -> bytes:
    """The contents of a member, without what fills its last block."""
    return _exactly(drive, size + -size % BLOCK)[:size]


def _exactly(drive: BinaryIO, size: int) -> bytes:
    data = drive.read(size)
    if len(data) != size:
        raise OSError("the config drive ends in the middle of a file")
    return data


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
