"""The writable layer: memory, a blank disk file, or a session's disk that is kept."""

from __future__ import annotations

import os
import struct

from apppot.guest import syscalls, tools
from apppot.guest.merge.root import WORK, map_owner

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from apppot.guest.protocol.job import Job

POINT = WORK + "/scratch"
UPPER = POINT + "/upper"

_EXT_MAGIC_AT, _EXT_MAGIC = 1080, b"\x53\xef"
# A new file is all zeros: no need to write any, neither here nor after the mount.
_BLANK = ("-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1")
# Below this a file system counts as filling its disk.
_SLACK_BYTES = 64 << 20
_BLKGETSIZE64 = 0x80081272


def mount(job: Job) -> None:
    """Mount the job's writable layer at POINT, with the directories that overlayfs wants.

    A session's disk gets its file system at its first use and grows with its file.  Its files
    of the account `user` have the ids of images, as base and changes have.
    """
    os.mkdir(POINT)
    if job.scratch is None:
        syscalls.mount("scratch", POINT, "tmpfs", syscalls.MS_NOATIME, "mode=0755,size=90%")
    else:
        _mount_disk(os.fsdecode(job.scratch), job.session)
    # The pot's own programs save what is on the disk, with the ids of images.
    if job.session and job.uid and not job.in_pot:
        map_owner([POINT], job.uid, job.gid)
    for name in ("upper", "work"):
        if not os.path.isdir(f"{POINT}/{name}"):
            os.mkdir(f"{POINT}/{name}", 0o755)


def _mount_disk(device: str, session: bool) -> None:
    if not (session and _has_file_system(device)):
        # What nobody keeps needs no journal.
        journal = () if session else ("-O", "^has_journal")
        tools.run("/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", *_BLANK, *journal, device)
    syscalls.mount(device, POINT, "ext4", syscalls.MS_NOATIME, "noinit_itable")
    if session and _has_grown(device):
        tools.run("/usr/sbin/resize2fs", device)


def _has_grown(device: str) -> bool:
    """Whether the disk is larger than its file system with its own tables."""
    found = os.statvfs(POINT)
    used = found.f_blocks * found.f_frsize
    return _device_bytes(device) > used + used // 16 + _SLACK_BYTES


def _has_file_system(device: str) -> bool:
    with open(device, "rb") as disk:
        disk.seek(_EXT_MAGIC_AT)
        return disk.read(2) == _EXT_MAGIC


def _device_bytes(device: str) -> int:
    import fcntl

    with open(device, "rb") as disk:
        (size,) = struct.unpack("<Q", fcntl.ioctl(disk, _BLKGETSIZE64, bytes(8)))
    return int(size)


def watch() -> int:
    """A descriptor that learns of each write that fails from now on; for `settle`."""
    return os.open(POINT, os.O_RDONLY | os.O_CLOEXEC)


def settle(watched: int) -> None:
    """Write everything to the disk.  Raises OSError where something written was lost."""
    try:
        syscalls.sync_file_system(watched)
    except OSError as error:
        why = f"{os.strerror(error.errno or 0)}; is the disk of the host full?"
        raise OSError(f"the session could not keep what was written: {why}") from error
    finally:
        os.close(watched)


# Of the generated files, those that a program in the session replaces with its own version.
REFRESHED = ("etc/passwd", "etc/group", "etc/shadow")


def refresh(generated: str) -> None:
    """Give a session's own account files the lines of this run's caller.

    A file of the session hides the generated one below it; the generated one was made from it.
    """
    for path in REFRESHED:
        own = f"{UPPER}/{path}"
        if os.path.isfile(own) and not os.path.islink(own):
            rewrite(own, f"{generated}/{path}")


def rewrite(path: str, source: str) -> None:
    """Put the contents of `source` into the file `path`, which keeps its attributes."""
    before = os.stat(path)
    with open(source, "rb") as new, open(path, "r+b") as file:
        file.write(new.read())
        file.truncate()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
