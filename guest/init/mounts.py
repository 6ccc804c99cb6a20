"""The kernel's file systems, in the pot and in the merged root."""

from __future__ import annotations

import os

from apppot.guest import shares, syscalls
from apppot.guest.merge.root import ROOT
from apppot.guest.protocol.job import JOB_DIR

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from apppot.guest.protocol.job import Job, Mount

_SAFE = syscalls.MS_NOSUID | syscalls.MS_NODEV

# (file system, mount point, flags, options); the kernel mounts devtmpfs on /dev by itself.
_POT = (
    ("proc", "/proc", _SAFE | syscalls.MS_NOEXEC, None),
    ("tmpfs", "/run", _SAFE, "mode=0755"),
)
_GUEST = (
    ("proc", "proc", _SAFE | syscalls.MS_NOEXEC, None),
    ("sysfs", "sys", _SAFE | syscalls.MS_NOEXEC, None),
    ("devtmpfs", "dev", syscalls.MS_NOSUID, "mode=0755"),
    ("devpts", "dev/pts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666"),
    ("tmpfs", "dev/shm", _SAFE, "mode=1777"),
    ("tmpfs", "run", _SAFE, "mode=0755"),
)
# Wanted by some programs, missed by none that we know: a kernel without them still boots.
_OPTIONAL = (
    ("mqueue", "dev/mqueue", _SAFE | syscalls.MS_NOEXEC, None),
    ("cgroup2", "sys/fs/cgroup", _SAFE | syscalls.MS_NOEXEC, None),
)
_LINKS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}


def mount_pot() -> None:
    """Mount what the agent itself needs."""
    for fstype, point, flags, data in _POT:
        if not os.path.ismount(point):
            syscalls.mount(fstype, point, fstype, flags, data)
    if not os.path.ismount("/dev"):
        syscalls.mount("devtmpfs", "/dev", "devtmpfs", syscalls.MS_NOSUID, "mode=0755")
    os.makedirs("/run/apppot", exist_ok=True)


def mount_guest() -> None:
    """Mount the kernel's file systems into the merged root."""
    for fstype, point, flags, data in _GUEST:
        place = f"{ROOT}/{point}"
        if not os.path.isdir(place):
            os.mkdir(place)
        syscalls.mount(fstype, place, fstype, flags, data)
    for fstype, point, flags, data in _OPTIONAL:
        try:
            os.makedirs(f"{ROOT}/{point}", exist_ok=True)
            syscalls.mount(fstype, f"{ROOT}/{point}", fstype, flags, data)
        except OSError:
            continue
    for name, target in _LINKS.items():
        if not os.path.lexists(f"{ROOT}/dev/{name}"):
            os.symlink(target, f"{ROOT}/dev/{name}")


def mount_host_directories(job: Job) -> None:
    """Mount the job directory and the caller's --bind directories, without setuid and devices."""
    if job.job_dir is not None:
        shares.mount(job.share, job.job_dir, ROOT + JOB_DIR, _SAFE)
    for number, mount in enumerate(job.mounts):
        if mount.name:
            _mount_file(job.share, mount, number)
        else:
            target = ROOT + os.fsdecode(mount.target)
            _mount_directory(job.share, mount.source, target, mount.read_only)


def _mount_directory(share: str, source: bytes, target: str, read_only: bool) -> None:
    # The mount is read-only, not the file system: others may still change what it shows.
    shares.mount(share, source, target, _SAFE)
    if read_only:
        _make_read_only(target)


def _make_read_only(target: str) -> None:
    flags = syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY | _SAFE
    syscalls.mount("none", target, None, flags)


def _mount_file(share: str, mount: Mount, number: int) -> None:
    """Shares are directories; a single file is bound out of one that is kept aside."""
    aside = f"/run/apppot/file{number}"
    os.mkdir(aside)
    _mount_directory(share, mount.source, aside, mount.read_only)
    target = ROOT + os.fsdecode(mount.target)
    syscalls.mount(os.fsencode(aside) + b"/" + mount.name, target, None, syscalls.MS_BIND)
    if mount.read_only:
        _make_read_only(target)
