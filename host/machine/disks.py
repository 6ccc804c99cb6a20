"""Disks of a guest that are made for one run."""

from __future__ import annotations

import contextlib
import os
import resource
import sys

from apppot.guest.protocol import drive
from apppot.guest.protocol.job import Job
from apppot.host.common.errors import HypervisorError
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.process.rundir import RunDir


def check_file_size(plan: LaunchPlan) -> None:
    """The guest's memory is a file, for which a soft limit can be lifted, a hard one not."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    need = max(plan.hypervisor.surroundings(plan).temporary, plan.scratch or 0)
    if hard != resource.RLIM_INFINITY and hard < need:
        raise HypervisorError(
            f"files may have {hard >> 10} KiB here (ulimit -f), the guest needs {need >> 10} KiB",
            "raise the hard limit on the size of files, or ask for less memory with --mem",
        )


def disk_files(plan: LaunchPlan, rundir: RunDir, stack: contextlib.ExitStack) -> list[int]:
    """Disks of the guest that are files on a disk here, without a name: gone with the guest.

    The guest's kernel opens each through its descriptor, by the links own/scratch and own/drive.
    """
    place = os.environ.get("TMPDIR") or "/tmp"
    files = {"scratch": _scratch_disk(plan, place), "drive": _drive_disk(plan, place, rundir)}
    for name, fd in files.items():
        if fd is not None:
            stack.callback(os.close, fd)
            os.symlink(f"/proc/self/fd/{fd}", os.path.join(rundir.path, "own", name))
    return [fd for fd in files.values() if fd is not None]


def _scratch_disk(plan: LaunchPlan, place: str) -> int | None:
    """A sparse file for the writable layer."""
    if plan.scratch is None:
        return None
    room = os.statvfs(place)
    if room.f_bavail * room.f_frsize < plan.scratch:
        sys.stderr.write(f"apppot: warning: {place} has less room than --scratch asks for\n")
    try:
        fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.truncate(fd, plan.scratch)
    except OSError as error:
        raise HypervisorError(
            f"no scratch disk can be made in {place}: {error.strerror}",
            "set TMPDIR to a directory on a disk with room",
        ) from error
    return fd


def _drive_disk(plan: LaunchPlan, place: str, rundir: RunDir) -> int | None:
    """A file for the config drive, where it carries too much for memory."""
    if plan.copied is None:
        return None
    from apppot.host.machine import inputs

    try:
        if inputs.room(plan.copied, plan.inputs, rundir.path) <= inputs.IN_MEMORY:
            return None
        return inputs.open_disk(place)
    except OSError as error:
        raise _not_copied(place, error) from error


def _not_copied(place: str, error: OSError) -> HypervisorError:
    file = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return HypervisorError(
        f"the job directory's files cannot be copied to {place}: {file}{error.strerror}",
        "name those that the job needs (--input), or set TMPDIR to a directory on a disk with room",
    )


def write_drive(plan: LaunchPlan, job: Job, rundir: RunDir) -> None:
    """Write the config drive: `job`, and the files of a copied job directory."""
    if plan.copied is None:
        rundir.file("own/drive", drive.pack(job.dump()))
        return
    from apppot.host.machine import inputs

    path = os.path.join(rundir.path, "own", "drive")
    try:
        # Through the link, where it lies on a disk.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            inputs.write(file, job.dump(), plan.copied, plan.inputs, rundir.path)
    except OSError as error:
        raise _not_copied(os.path.dirname(os.path.realpath(path)), error) from error
