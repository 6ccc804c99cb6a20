"""What goes back from a guest without a launcher: outputs, and an output disk."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from apppot.guest.payload import process, report

SIZE = 1 << 20


@pytest.fixture
def outputs(tmp_path: Path) -> report.Outputs:
    work, job = tmp_path / "work", tmp_path / "job"
    (job / "a").mkdir(parents=True)
    work.mkdir()
    (work / "stdout").write_bytes(b"said")
    (job / "a" / "x.dat").write_bytes(bytes(range(256)) * 100)
    return report.Outputs({"status": 3}, str(work), str(job), ["a/x.dat"])


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(report.DISK_MARK.ljust(SIZE, b"\xee"))
    return path


def test_patterns_stay_in_the_job_directory(tmp_path: Path) -> None:
    job = tmp_path / "job[1]"
    for name in ("a/b/c.dat", "top.dat", "a/other"):
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).touch()
    (tmp_path / "secret.dat").touch()
    patterns = [b"**/*.dat", b"top.*", b"../*.dat", str(tmp_path).encode() + b"/*", b"none"]
    found, missing = report.collect(str(job), patterns)
    assert sorted(found) == ["a/b/c.dat", "top.dat"]
    assert missing == ["../*.dat", f"{tmp_path}/*", "none"]


def test_an_output_disk_is_a_tar(outputs: report.Outputs, disk: Path) -> None:
    assert report.find_disk(["/nowhere", str(disk)]) == str(disk)
    outputs.to_disk(str(disk))
    assert disk.stat().st_size == SIZE
    with tarfile.open(disk) as archive:
        names = archive.getnames()
        first = archive.extractfile(names[0])
        data = archive.extractfile("job/a/x.dat")
        assert first is not None and json.load(first) == {"status": 3}
        assert data is not None and data.read() == bytes(range(256)) * 100
    assert names == [report.STATUS_MEMBER, "apppot/stdout", "job/a/x.dat"]
    assert report.find_disk([str(disk)]) is None


def test_half_an_archive_is_none(outputs: report.Outputs, disk: Path) -> None:
    with open(disk, "r+b") as file:
        file.truncate(20480)
    with pytest.raises(report.ReportError, match="too small"):
        outputs.to_disk(str(disk))
    with pytest.raises(tarfile.TarError):
        tarfile.open(disk)


def test_what_failed_is_said(outputs: report.Outputs, tmp_path: Path) -> None:
    (problem,) = report.send(outputs, None, str(tmp_path / "missing"))
    assert "missing" in problem


def test_a_signal_is_128_and_its_number() -> None:
    assert [process.exit_code(status) for status in (0, 7 << 8, 9)] == [0, 7, 137]
