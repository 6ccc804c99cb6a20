"""The image probe: superblocks crafted byte by byte, truncation, and any bytes at all."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from pathlib import Path

import pytest
from apppot.host.common.errors import ImageError
from apppot.host.images.probe import (
    ImageFormat,
    probe,
    probe_descriptor,
    require_bootable,
    tar_compression,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def squashfs(size: int, compression: int = 6, major: int = 4) -> bytes:
    head = bytearray(96)
    head[:4] = b"hsqs"
    struct.pack_into("<H", head, 20, compression)
    struct.pack_into("<H", head, 28, major)
    struct.pack_into("<Q", head, 40, size)
    return bytes(head)


def erofs(blocks: int, bits: int = 12) -> bytes:
    image = bytearray(2048)
    image[1024:1028] = b"\xe2\xe1\xf5\xe0"
    image[1036] = bits
    struct.pack_into("<I", image, 1060, blocks)
    return bytes(image)


def ext(blocks: int, *, compat: int = 0x4, incompat: int = 0x240, high: int = 0) -> bytes:
    image = bytearray(2048)
    struct.pack_into("<I", image, 1024 + 4, blocks)
    struct.pack_into("<I", image, 1024 + 24, 2)
    image[1080:1082] = b"\x53\xef"
    struct.pack_into("<II", image, 1024 + 92, compat, incompat)
    struct.pack_into("<I", image, 1024 + 0x150, high)
    return bytes(image)


def mbr(kind: int, first: int, count: int) -> bytes:
    sector = bytearray(512)
    struct.pack_into("<B3xB3xII", sector, 446, 0x80, kind, first, count)
    sector[510:] = b"\x55\xaa"
    return bytes(sector)


def gpt(first: int, last: int) -> bytes:
    header = bytearray(512)
    header[:8] = b"EFI PART"
    struct.pack_into("<QII", header, 72, 2, 128, 128)
    entry = bytearray(128)
    entry[:16] = bytes.fromhex("af3dc60f838472478e793d69d8477de4")
    struct.pack_into("<QQ", entry, 32, first, last)
    return mbr(0xEE, 1, 99) + bytes(header) + bytes(128) + bytes(entry)


def cow(version: int, backing: bytes) -> bytes:
    gap = bytes(24) if version == 3 else b""
    return b"OOOM" + struct.pack(">I", version) + gap + backing.ljust(4096, b"\0")


def put(folder: Path, head: bytes, size: int = 0) -> str:
    path = folder / "image"
    path.write_bytes(head)
    os.truncate(path, max(size, len(head)))
    return str(path)


def test_squashfs_says_its_compression(tmp_path: Path) -> None:
    found = probe(put(tmp_path, squashfs(5000), 8192))
    assert (found.format, found.size, found.detail) == (ImageFormat.SQUASHFS, 8192, "zstd")


def test_a_descriptor_still_stands_at_its_start(tmp_path: Path) -> None:
    with open(put(tmp_path, squashfs(96)), "rb", buffering=0) as handle:
        assert probe_descriptor(handle.fileno(), "image").size == 96
        assert handle.read(4) == b"hsqs"


def test_erofs(tmp_path: Path) -> None:
    assert probe(put(tmp_path, erofs(3), 3 * 4096)).format is ImageFormat.EROFS


@pytest.mark.parametrize(
    ("compat", "incompat", "detail"), [(0, 0x2, "ext2"), (4, 0x2, "ext3"), (4, 0x240, "ext4")]
)
def test_generations_of_ext(tmp_path: Path, compat: int, incompat: int, detail: str) -> None:
    found = probe(put(tmp_path, ext(4, compat=compat, incompat=incompat), 4 * 4096))
    assert (found.format, found.detail) == (ImageFormat.EXT4, detail)


def test_a_journal_to_replay_is_refused_with_the_command_that_does_it(tmp_path: Path) -> None:
    found = probe(put(tmp_path, ext(4, incompat=0x244), 4 * 4096))
    with pytest.raises(ImageError, match="journal") as caught:
        require_bootable(found, "dirty.img")
    assert "e2fsck -fy dirty.img" in caught.value.hint


@pytest.mark.parametrize(
    ("head", "wanted"),
    [
        (squashfs(100_000), 100_000),
        (erofs(1000), 1000 * 4096),
        (ext(1000), 1000 * 4096),
        (ext(0, incompat=0x2C0, high=1), 4096 << 32),
        (mbr(0x83, 2048, 4096), 6144 * 512),
    ],
)
def test_truncation_names_both_sizes(tmp_path: Path, head: bytes, wanted: int) -> None:
    path = put(tmp_path, head, 5000)
    with pytest.raises(ImageError, match=f"truncated: 5000 of {wanted} bytes") as caught:
        probe(path)
    assert caught.value.hint


def test_whole_images_of_exactly_their_size_pass(tmp_path: Path) -> None:
    for head, size in ((squashfs(5001), 5001), (erofs(2), 8192), (ext(3), 12288)):
        assert probe(put(tmp_path, head, size)).size == size


def test_first_linux_partition_of_an_mbr_disk(tmp_path: Path) -> None:
    found = probe(put(tmp_path, mbr(0x83, 4, 4), 8 * 512))
    assert (found.format, found.offset, found.length) == (ImageFormat.RAW, 2048, 2048)


def test_first_linux_partition_of_a_gpt_disk(tmp_path: Path) -> None:
    found = probe(put(tmp_path, gpt(8, 15), 64 * 512))
    assert (found.detail, found.offset, found.length) == ("gpt", 4096, 4096)


def test_a_disk_without_linux_is_said(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no Linux partition"):
        probe(put(tmp_path, mbr(0x07, 4, 4), 4096))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_cow_names_its_base(tmp_path: Path, version: int) -> None:
    found = probe(put(tmp_path, cow(version, b"/images/base.img")))
    assert (found.format, found.backing) == (ImageFormat.COW, "/images/base.img")


def test_tars_of_every_age_and_compression(tmp_path: Path) -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            archive.addfile(tarfile.TarInfo("file"))
        assert probe(put(tmp_path, buffer.getvalue())).detail == "plain"
    assert tar_compression(b"\x1f\x8b\x08") == "gzip"
    assert tar_compression(b"\x28\xb5\x2f\xfd") == "zstd"
    assert tar_compression(bytes(512)) is None


def test_a_tar_is_told_to_be_imported(tmp_path: Path) -> None:
    found = probe(put(tmp_path, b"\x1f\x8b" + bytes(100)))
    with pytest.raises(ImageError) as caught:
        require_bootable(found, "x.tar.gz")
    assert "apppot image import" in caught.value.hint


def sif(content: bytes, system: int = 1, part: int = 2, at: int = 8192) -> bytes:
    """A .sif as Apptainer lays it out: a definition file, then the partition."""
    header = b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0" + b"01\0" + b"02\0" + bytes(16)
    header += struct.pack("<8q", 1, 1, 46, 48, 4096, 48 * 585, at, len(content))
    definition = struct.pack("<i?3I7q", 0x4001, True, 1, 0, 0, 8000, 10, 10, 0, 0, 0, 0)
    partition = struct.pack(
        "<i?3I7q", 0x4004, True, 2, 0, 0, at, len(content), len(content), 0, 0, 0, 0
    )
    partition = partition + bytes(128) + struct.pack("<ii3s", system, part, b"02\0")
    table = definition.ljust(585, b"\0") + partition.ljust(585, b"\0")
    return (header.ljust(4096, b"\0") + table).ljust(at, b"\0") + content


def test_the_partition_of_a_sif(tmp_path: Path) -> None:
    found = probe(put(tmp_path, sif(squashfs(96))))
    assert (found.format, found.offset, found.length) == (ImageFormat.SIF, 8192, 96)
    require_bootable(found, "x.sif")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (sif(squashfs(96), system=5), "no plain squashfs"),
        (sif(squashfs(96), part=3), "no system partition"),
        (sif(squashfs(96))[:-1], "truncated"),
        (sif(b"else" * 30), "damaged"),
        (sif(squashfs(96))[:100], "truncated"),
        (sif(squashfs(96))[:96] + bytes(200), "damaged"),
    ],
)
def test_sifs_that_cannot_be_used(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(ImageError, match=problem):
        probe(put(tmp_path, content))


def test_what_is_no_image_at_all(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path, problem in (
        (tmp_path / "missing", "does not exist"),
        (tmp_path, "directory"),
        (tmp_path / "empty", "is empty"),
        (Path("/dev/null"), "neither a file"),
        (Path("bad\0name"), "cannot be opened"),
    ):
        with pytest.raises(ImageError, match=problem):
            probe(path)


MAGICS = st.sampled_from(
    [
        b"",
        squashfs(300),
        erofs(1, 9),
        ext(1),
        gpt(2, 3),
        mbr(0x83, 1, 1),
        cow(3, b"base"),
        b"OOOM",
        bytes(32) + b"SIF_MAGIC\x00",
    ]
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(magic=MAGICS, cut=st.integers(0, 4200), at=st.integers(0, 2100), noise=st.binary())
def test_any_bytes_give_a_kind_or_an_image_error(
    tmp_path: Path, magic: bytes, cut: int, at: int, noise: bytes
) -> None:
    image = bytearray(magic[:cut])
    image[at : at + len(noise)] = noise
    try:
        found = probe(put(tmp_path, bytes(image)))
    except ImageError:
        return
    assert found.offset + found.length <= found.size
