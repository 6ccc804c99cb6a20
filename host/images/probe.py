"""What kind of image a file is, from its first kilobytes.

On the way of every `apppot run`: reads at most three small blocks and imports only os, struct,
enum and dataclasses.  Numbers from a superblock are data of a stranger: all are bounds-checked.
"""

from __future__ import annotations

import os
import struct
from enum import StrEnum

from apppot.host.common.errors import ImageError
from apppot.host.common.frozen import frozen

HEAD_BYTES = 8192
SECTOR = 512
LINUX_MBR_TYPES = frozenset({0x83, 0x8E, 0xFD})
GPT_LINUX_TYPES = frozenset(
    {
        bytes.fromhex("af3dc60f838472478e793d69d8477de4"),  # Linux file system data
        bytes.fromhex("e3bc684fcde8b14d96e7fbcaf984b709"),  # Linux root, x86-64
    }
)
MAX_GPT_ENTRIES = 128
SQUASHFS_COMPRESSION = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
TAR_COMPRESSION = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
)
RECOPY = "copy or download the file again; this one is incomplete"
# A .sif's table: packed descriptors, of which these parts count.
SIF_DESCRIPTOR, SIF_EXTRA, MAX_SIF_TABLE = 585, 201, 1 << 20
SIF_PARTITION, SIF_PRIMARY, SIF_SQUASHFS = 0x4004, 2, 1
IMPORT = "import it first: apppot image import FILE"


class ImageFormat(StrEnum):
    """The kinds of file that AppPot recognises."""

    SQUASHFS = "squashfs"
    EROFS = "erofs"
    EXT4 = "ext4"
    RAW = "raw"
    COW = "cow"
    TAR = "tar"
    SIF = "sif"

    @property
    def bootable(self) -> bool:
        """Whether a guest can mount it as it is; the others are imported first."""
        return self is not ImageFormat.TAR

    @property
    def file_system(self) -> str:
        """What the kernel calls the file system in it."""
        inside = {ImageFormat.RAW: "ext4", ImageFormat.SIF: "squashfs"}
        return inside.get(self, str(self))


@frozen
class Probed:
    """What a file's own header says.

    `size` is the file's length in bytes; `detail` a word for people (compression, "ext3",
    "gpt").  `offset` and `length` (bytes) place the first Linux partition of a raw disk or .sif;
    `backing` is a COW file's base; `dirty` says that a journal must be replayed before a
    read-only mount works.
    """

    format: ImageFormat
    size: int
    detail: str = ""
    offset: int = 0
    length: int = 0
    backing: str = ""
    dirty: bool = False


def probe(path: str | os.PathLike[str]) -> Probed:
    """Recognise the file at `path`.

    Raises ImageError for what is missing, unreadable, empty, truncated or of no known kind,
    and never anything else.
    """
    name = os.fspath(path)
    try:
        handle = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ImageError(f"image {name!r} does not exist", "apppot image list") from None
    except PermissionError:
        raise ImageError(
            f"image {name!r} cannot be read: permission denied", f"ls -l {name}; id"
        ) from None
    except (OSError, ValueError) as error:
        raise ImageError(f"image {name!r} cannot be opened: {error}") from None
    try:
        return probe_descriptor(handle, name)
    finally:
        os.close(handle)


def probe_descriptor(handle: int, name: str) -> Probed:
    """As `probe`, on an open descriptor; `name` is for messages."""
    try:
        size = _size(handle, name)
        head = os.pread(handle, HEAD_BYTES, 0)
        if not head:
            raise ImageError(f"image {name!r} is empty", RECOPY)
        if head[32:42] == b"SIF_MAGIC\x00":
            return _sif(handle, head, size, name)
        for recognise in (_squashfs, _erofs, _ext, _cow, _tar):
            found = recognise(head, size, name)
            if found is not None:
                return found
        disk = _disk(handle, head, size, name)
    except OSError as error:
        raise ImageError(f"image {name!r} cannot be read: {error.strerror}") from None
    if disk is not None:
        return disk
    raise ImageError(
        f"image {name!r} is of no kind that AppPot knows",
        "squashfs, EROFS, ext2/3/4, a raw disk with partitions, or a tar to import",
    )


def require_bootable(probed: Probed, name: str) -> None:
    """Raise ImageError where a guest could not mount the file as it is."""
    if not probed.format.bootable:
        kind = f"{probed.format} ({probed.detail})" if probed.detail else str(probed.format)
        raise ImageError(f"{name!r} is a {kind} archive, not a mountable image", IMPORT)
    if probed.dirty:
        raise ImageError(
            f"{name!r} was not unmounted cleanly: its journal must be replayed",
            f"e2fsck -fy {name}",
        )


def _size(handle: int, name: str) -> int:
    status = os.fstat(handle)
    kind = status.st_mode & 0o170000
    if kind == 0o040000:
        raise ImageError(
            f"image {name!r} is a directory",
            "pack it: tar -C DIR -c . | apppot image import - --name NAME",
        )
    if kind not in (0o100000, 0o060000):
        raise ImageError(f"image {name!r} is neither a file nor a block device")
    if kind == 0o100000:
        return status.st_size
    size = os.lseek(handle, 0, os.SEEK_END)
    os.lseek(handle, 0, os.SEEK_SET)  # the caller reads on from the start
    return size


def _check_length(name: str, kind: str, size: int, wanted: int) -> None:
    if size < wanted:
        raise ImageError(f"{kind} image {name!r} is truncated: {size} of {wanted} bytes", RECOPY)


def _squashfs(head: bytes, size: int, name: str) -> Probed | None:
    if head[:4] != b"hsqs":
        return None
    _check_length(name, "squashfs", size, 96)
    (compression,) = struct.unpack_from("<H", head, 20)
    (major,) = struct.unpack_from("<H", head, 28)
    if major != 4:
        raise ImageError(f"{name!r} is squashfs version {major}", "make it again with version 4")
    _check_length(name, "squashfs", size, struct.unpack_from("<Q", head, 40)[0])
    detail = SQUASHFS_COMPRESSION.get(compression, f"compression {compression}")
    return Probed(ImageFormat.SQUASHFS, size, detail)


def _erofs(head: bytes, size: int, name: str) -> Probed | None:
    if head[1024:1028] != b"\xe2\xe1\xf5\xe0":
        return None
    _check_length(name, "EROFS", size, 1024 + 128)
    bits = head[1024 + 12]
    if not 9 <= bits <= 16:
        raise ImageError(f"EROFS image {name!r} is damaged: block size 2^{bits}", RECOPY)
    blocks = struct.unpack_from("<I", head, 1024 + 36)[0]
    _check_length(name, "EROFS", size, blocks << bits)
    return Probed(ImageFormat.EROFS, size)


def _ext(head: bytes, size: int, name: str) -> Probed | None:
    if head[1080:1082] != b"\x53\xef":
        return None
    _check_length(name, "ext", size, 2048)
    (log_size,) = struct.unpack_from("<I", head, 1024 + 24)
    compat, incompat = struct.unpack_from("<II", head, 1024 + 92)
    blocks: int = struct.unpack_from("<I", head, 1024 + 4)[0]
    if incompat & 0x80:  # 64bit
        blocks |= struct.unpack_from("<I", head, 1024 + 0x150)[0] << 32
    if log_size > 6 or not blocks:
        raise ImageError(f"ext image {name!r} has a damaged superblock", f"e2fsck -fn {name}")
    _check_length(name, "ext", size, blocks << (10 + log_size))
    older = "ext3" if compat & 0x4 else "ext2"
    detail = "ext4" if incompat & 0x2C0 else older  # extents, 64bit, flex_bg: only ext4
    return Probed(ImageFormat.EXT4, size, detail, dirty=bool(incompat & 0x4))


def _sif(handle: int, head: bytes, size: int, name: str) -> Probed:
    """A container of Singularity or Apptainer: its primary system partition, a squashfs."""
    _check_length(name, ".sif", size, 128)
    start, length = struct.unpack_from("<qq", head, 96)
    if not (0 < start < size and 0 < length <= MAX_SIF_TABLE):
        raise ImageError(f".sif {name!r} has a damaged table", RECOPY)
    table = os.pread(handle, length, start)
    for at in range(0, len(table) - SIF_DESCRIPTOR + 1, SIF_DESCRIPTOR):
        kind, used = struct.unpack_from("<i?", table, at)
        offset, extent = struct.unpack_from("<qq", table, at + 17)
        system, part = struct.unpack_from("<ii", table, at + SIF_EXTRA)
        if not used or kind != SIF_PARTITION or part != SIF_PRIMARY:
            continue
        if system != SIF_SQUASHFS or offset <= 0 or extent <= 0:
            raise ImageError(
                f".sif {name!r} holds no plain squashfs",
                "an encrypted or ext3 container cannot be read: convert it with apptainer build",
            )
        _check_length(name, ".sif", size, offset + extent)
        if os.pread(handle, 4, offset) != b"hsqs":
            raise ImageError(f".sif {name!r} is damaged: no squashfs in its partition", RECOPY)
        return Probed(ImageFormat.SIF, size, "squashfs", offset, extent)
    raise ImageError(f".sif {name!r} has no system partition", "give a whole container image")


def _cow(head: bytes, size: int, name: str) -> Probed | None:
    if head[:4] not in (b"OOOM", b"MOOO"):
        return None
    order = ">" if head[:4] == b"OOOM" else "<"
    _check_length(name, "COW", size, 16)
    (version,) = struct.unpack_from(order + "I", head, 4)
    # Versions 1 and 2 hold the name in 256 and 4096 bytes right behind the version; version 3
    # has time, size, sector size, alignment and format (24 bytes) between them.  Where the
    # format (always 0) is not at 28, an old 64-bit kernel wrote 8 bytes of time instead of 4.
    third = 32 if head[28:32] == bytes(4) else 36
    starts = {1: (8, 256), 2: (8, 4096), 3: (third, 4096)}
    if version not in starts:
        raise ImageError(f"COW file {name!r} has unknown version {version}")
    start, length = starts[version]
    backing = head[start : start + length].split(b"\0", 1)[0]
    return Probed(ImageFormat.COW, size, f"version {version}", backing=os.fsdecode(backing))


def tar_compression(head: bytes) -> str | None:
    """ "plain" or the compression of a tar that begins with `head`; None where it is no tar.

    What is behind a compression's magic shows only when it is read.
    """
    for magic, compression in TAR_COMPRESSION:
        if head.startswith(magic):
            return compression
    return "plain" if _tar_checksum_holds(head[:SECTOR]) else None


def _tar_checksum_holds(header: bytes) -> bool:
    """Whether a 512-byte tar header has the right sum, which archives of every age carry."""
    if len(header) < SECTOR:
        return False
    try:
        wanted = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return wanted == sum(header[:148]) + 8 * 0x20 + sum(header[156:])


def _tar(head: bytes, size: int, name: str) -> Probed | None:
    compression = tar_compression(head)
    return Probed(ImageFormat.TAR, size, compression) if compression else None


def _disk(handle: int, head: bytes, size: int, name: str) -> Probed | None:
    """A partition table with at least one Linux partition."""
    if len(head) < SECTOR or head[510:512] != b"\x55\xaa":
        return None
    gpt = head[SECTOR : SECTOR + 8] == b"EFI PART"
    _check_length(name, "disk", size, 2 * SECTOR if gpt else SECTOR)
    place = _gpt_linux(handle, head) if gpt else _mbr_linux(head)
    if place is None:
        raise ImageError(
            f"disk image {name!r} has no Linux partition", "give the image of the partition itself"
        )
    offset, length = place
    _check_length(name, "disk", size, offset + length)
    return Probed(ImageFormat.RAW, size, "gpt" if gpt else "mbr", offset, length)


def _mbr_linux(head: bytes) -> tuple[int, int] | None:
    for index in range(4):
        entry = head[446 + 16 * index : 462 + 16 * index]
        first, count = struct.unpack_from("<II", entry, 8)
        if entry[4] in LINUX_MBR_TYPES and first and count:
            return first * SECTOR, count * SECTOR
    return None


def _gpt_linux(handle: int, head: bytes) -> tuple[int, int] | None:
    table, count, width = struct.unpack_from("<QII", head, SECTOR + 72)
    if not 128 <= width <= 4096 or table >= 1 << 48:
        return None
    entries = os.pread(handle, min(count, MAX_GPT_ENTRIES) * width, table * SECTOR)
    for start in range(0, len(entries) - 127, width):
        first, last = struct.unpack_from("<QQ", entries, start + 32)
        if entries[start : start + 16] in GPT_LINUX_TYPES and 0 < first <= last:
            return first * SECTOR, (last - first + 1) * SECTOR
    return None
