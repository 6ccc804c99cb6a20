"""Reading tar archives in a guest: lists of directories, times, and what is damaged."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from apppot.guest.merge import archive
from apppot.guest.merge.archive import Damaged

from tests.harness.archives import read

END = bytes(10240)


def tar_of(info: tarfile.TarInfo, data: bytes = b"") -> bytes:
    info.size = len(data)
    padded = data + bytes(-len(data) % 512)
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape") + padded + END


def test_times_are_exact_where_the_format_has_them(tmp_path: Path) -> None:
    for text, wanted in [
        ("1.5", 1_500_000_000),
        ("-1.25", -1_250_000_000),
        ("981173106.123456789", 981173106123456789),
    ]:
        info = tarfile.TarInfo("x")
        info.pax_headers = {"mtime": text}
        (tmp_path / "a").write_bytes(tar_of(info))
        with archive.opened(str(tmp_path / "a")) as source:
            (member,) = source.members()
        assert archive.modified_ns(member) == (wanted, True)
    info.pax_headers, info.mtime = {}, 7
    assert archive.modified_ns(info) == (7_000_000_000, False)
    info.pax_headers = {"mtime": "soon"}
    with pytest.raises(Damaged, match="impossible time"):
        archive.modified_ns(info)


@pytest.mark.parametrize("cut", [100, 1024, 1500, 2048])
def test_a_cut_archive_is_damaged(cut: int, tmp_path: Path) -> None:
    whole = tar_of(tarfile.TarInfo("x"), b"x" * 1000)
    (tmp_path / "a").write_bytes(whole[:cut])
    with pytest.raises(Damaged):
        read(tmp_path / "a")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    (tmp_path / "a").write_bytes(packed.getvalue()[:-4])
    with pytest.raises(Damaged, match="cut off"):
        read(tmp_path / "a")


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    whole = tar_of(tarfile.TarInfo("x"))[:512] + b"\1" * 512 + END
    (tmp_path / "a").write_bytes(whole)
    with pytest.raises(Damaged, match="no header"):
        read(tmp_path / "a")


def test_a_list_beyond_belief_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type = b"D"
    info.size = archive.MOST_HEADER + 1
    (tmp_path / "a").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + END)
    with pytest.raises(Damaged, match="the list of"):
        read(tmp_path / "a")
