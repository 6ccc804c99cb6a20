"""Recipes on top of a parent: packages, files and `run` steps, done in a virtual machine.

The guest runs them as root with network over the parent image and writes the whole system as a
tar to its stdout, which becomes a squashfs on the way.  Nothing of the caller or the host is in
it, and nothing that the agent generates for a guest.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence

from apppot.host.common.errors import ApppotError, BuildError
from apppot.host.common.progress import Progress
from apppot.host.common.text import printable
from apppot.host.images import pack
from apppot.host.images.building.guest_build import SCRIPT
from apppot.host.images.probe import ImageFormat
from apppot.host.images.record import Image
from apppot.host.images.workspace import hold
from apppot.host.process.launcher import GuestCommand, stream

MEMORY, SCRATCH = "1G", "32G"  # the disk is sparse
SQUASHFS_TIME_AT = 8


def epoch_of(image: Image) -> int:
    """The time (seconds) that files new in a child image get: the parent's own.

    It stands in a squashfs that AppPot built; else it is when the parent came into the store.
    """
    if image.format is ImageFormat.SQUASHFS:
        with open(image.path, "rb") as file:
            head = file.read(96)
        (made,) = struct.unpack_from("<I", head, SQUASHFS_TIME_AT)
        if made:
            return int(made)
    if image.record is not None and image.record.created:
        moment = time.strptime(image.record.created, "%Y-%m-%dT%H:%M:%SZ")
        return int(time.mktime(moment)) - time.timezone
    return int(os.stat(image.path).st_mtime)


def guest_command(
    parent: Image, files: bool, packages: Sequence[str], steps: Sequence[str], epoch: int
) -> GuestCommand:
    """What a guest does for a build."""
    script = ("files" if files else "", " ".join(packages), *steps)
    return GuestCommand(
        os.path.abspath(parent.path),
        ("/bin/sh", "-c", SCRIPT, "sh", *script),
        memory=MEMORY,
        scratch=SCRATCH,
        hypervisor="uml",
        network=True,
        env=(f"SOURCE_DATE_EPOCH={epoch}",),
        workdir="/",
        stdin=True,
        neutral=True,
        bare=True,
    )


def build(
    parent: Image,
    packages: Sequence[str],
    files: bytes,
    steps: Sequence[str],
    epoch: int,
    image: str,
    title: str,
) -> None:
    """Write `parent` with `packages`, `files` (a tar) and `steps` on top to the squashfs `image`.

    No file's time is later than `epoch` (seconds).  Raises BuildError with what the failing
    step said last.
    """
    held = hold(parent.path)
    feed = os.memfd_create("files", os.MFD_CLOEXEC)
    try:
        os.write(feed, files)
        os.lseek(feed, 0, os.SEEK_SET)
        command = guest_command(parent, bool(files), packages, steps, epoch)
        with Progress(title) as progress, pack.Packer(image, epoch, clamp=True) as packer:
            stream(
                command,
                lambda line: progress.update(0, printable(line)),
                stdin=feed,
                data=packer.writer,
            )
    except ApppotError as error:
        said = [line for line in error.cause.splitlines() if line.strip()]
        raise BuildError(
            "\n    ".join([f"{title} failed", *(printable(line) for line in said)]),
            error.hint or "try the steps by hand: apppot console PARENT --user root",
        ) from None
    finally:
        os.close(feed)
        os.close(held)
