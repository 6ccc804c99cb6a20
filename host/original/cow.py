"""User-Mode Linux's copy-on-write files: made here, because a confined kernel may not create one.

Version 3 of the format, all numbers big-endian: header, a bitmap with one bit for each 512-byte
sector that was written, then the sectors at their own places.
"""

from __future__ import annotations

import os
import struct

from apppot.host.common.errors import ImageError
from apppot.host.images.probe import ImageFormat, probe

MAGIC = 0x4F4F4F4D
VERSION = 3
SECTOR = 512
ALIGNMENT = 4096
FORMAT_BITMAP = 0
# magic, version, modification time, size, sector size, alignment, format, backing file
HEADER = struct.Struct(">IIIQIII4096s")
BACKING_AT = HEADER.size - 4096
BACKING_BYTES = 4096


def prepare(cow: str, image: str) -> None:
    """Make `cow` a copy-on-write file over `image`, or check that it is one.

    Raises ImageError where it belongs to another image or another state of this one: its
    sectors would not fit.
    """
    stat = os.stat(image)
    try:
        fd = os.open(cow, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ImageError(
            f"the COW file {cow} cannot be written: {error.strerror}",
            "name one in a directory of yours",
        ) from None
    try:
        if os.fstat(fd).st_size == 0:
            _create(fd, image, stat)
        else:
            _check(cow, fd, image, stat)
    finally:
        os.close(fd)


def _create(fd: int, image: str, stat: os.stat_result) -> None:
    sectors = -(-stat.st_size // SECTOR)
    bitmap_at = _aligned(HEADER.size)
    data_at = _aligned(bitmap_at + -(-sectors // 8))
    # The length first: a file whose header stands is complete.
    os.ftruncate(fd, data_at + stat.st_size)
    header = HEADER.pack(
        *(MAGIC, VERSION, int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size, SECTOR, ALIGNMENT),
        *(FORMAT_BITMAP, _backing(image)),
    )
    os.pwrite(fd, header, 0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _backing(image: str) -> bytes:
    path = os.fsencode(os.path.abspath(image))
    if len(path) >= BACKING_BYTES:
        raise ImageError(f"the path of {image} is too long for a COW file")
    return path


def _check(cow: str, fd: int, image: str, stat: os.stat_result) -> None:
    probed = probe(cow)
    if probed.format is not ImageFormat.COW:
        raise ImageError(
            f"{cow} is no COW file of User-Mode Linux", "name a file that is not there"
        )
    if probed.detail != f"version {VERSION}":
        raise ImageError(f"the COW file {cow} is of {probed.detail}", "make it anew")
    _, _, mtime, size, *_ = HEADER.unpack(os.pread(fd, HEADER.size, 0))
    if (mtime, size) != (int(stat.st_mtime) & 0xFFFFFFFF, stat.st_size):
        raise ImageError(
            f"the COW file {cow} belongs to another state of {image}: size or time differ",
            "give the image that it was made with, or name a new COW file",
        )


def name_backing(cow: str, image: str) -> None:
    """Write the image's own path into the header: a confined kernel put its own view there."""
    fd = os.open(cow, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, _backing(image).ljust(BACKING_BYTES, b"\0"), BACKING_AT)
    finally:
        os.close(fd)
