"""The config drive: a bare tar whose first member is the job description.

Read as a block device without mounting it.  A volume label member could not come first, so the
drive is known by the name of its first member.  Where the job directory is copied, its files are
the members after that, below JOB_FILES, in the pax format.  A bootable disk of ours has one more
drive, which describes the disk itself.
"""

from __future__ import annotations

import os

JOB_MEMBER = b"apppot/job.json"
JOB_FILES = b"job/"
DISK_MEMBER = b"apppot/disk.json"
BLOCK = 512
_MAX_JOB = 64 << 20


class DriveError(ValueError):
    """The device or file is not a config drive."""


def pack(job: bytes, member: bytes = JOB_MEMBER) -> bytes:
    """A config drive with the given job description."""
    return first_member(job, member) + bytes(2 * BLOCK)


def first_member(job: bytes, member: bytes = JOB_MEMBER) -> bytes:
    """How a drive with the given job description begins."""
    return _header(member, len(job)) + job + bytes(-len(job) % BLOCK)


def _header(name: bytes, size: int) -> bytes:
    """A ustar header (POSIX.1-1988): mode 0600, owner root, time 0."""
    fields = (
        name.ljust(100, b"\0"),
        b"0000600\0",
        b"0000000\0",
        b"0000000\0",
        b"%011o\0" % size,
        b"00000000000\0",
        b" " * 8,
        b"0",
        bytes(100),
        b"ustar\x0000",
    )
    block = b"".join(fields).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def read_job(path: str, member: bytes = JOB_MEMBER) -> bytes:
    """The job description on the drive at `path`.  Raises DriveError, OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = os.read(fd, BLOCK)
        size = _job_size(header, path, member)
        data = bytearray()
        while len(data) < size:
            piece = os.read(fd, size - len(data))
            if not piece:
                raise DriveError(f"{path} ends after {len(data)} of {size} bytes of the job")
            data += piece
        return bytes(data)
    finally:
        os.close(fd)


def _job_size(header: bytes, path: str, member: bytes) -> int:
    name = header[:100].rstrip(b"\0")
    if len(header) != BLOCK or name != member or header[257:262] != b"ustar":
        raise DriveError(f"{path} is not a config drive")
    checked = header[:148] + b" " * 8 + header[156:]
    try:
        size, wanted = int(header[124:135], 8), int(header[148:154], 8)
    except ValueError as error:
        raise DriveError(f"{path} has a damaged header") from error
    if sum(checked) != wanted or size > _MAX_JOB:
        raise DriveError(f"{path} has a damaged header")
    return size
