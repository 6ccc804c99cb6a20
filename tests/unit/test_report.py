"""What goes back from a guest without a launcher: outputs, and an output disk."""

from __future__ import annotations

import json
import os
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
    return report.Outputs({"status": 3}, str(work), {"a/x.dat": str(job / "a" / "x.dat")})


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(report.DISK_MARK.ljust(SIZE, b"\xee"))
    return path


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_patterns_stay_in_the_job_directory(tmp_path: Path) -> None:
    job = tmp_path / "root" / "job[1]"
    put(job, "a/b/c.dat", "top.dat", "a/other")
    put(tmp_path, "root/secret.dat", "secret.dat")
    patterns = [b"**/*.dat", b"top.*", b"../*.dat", str(tmp_path).encode() + b"/*", b"none"]
    found, missing = report.collect(str(tmp_path / "root"), str(job), patterns)
    assert sorted(found) == ["a/b/c.dat", "top.dat"]
    assert Path(found["a/b/c.dat"]).read_text() == "a/b/c.dat"
    assert missing == ["../*.dat", f"{tmp_path}/*", "none"]


def test_an_absolute_pattern_is_one_of_the_jobs_root(tmp_path: Path) -> None:
    """As with a launcher: what it names comes back under its last name."""
    root = tmp_path / "root"
    put(root, "var/log/tool.log", "var/log/b.log", "opt/out/x/y", "home/user/job/in")
    (root / "link").symlink_to("/var/log")
    (root / "out").symlink_to(tmp_path)
    put(root, "etc/b.log")
    put(tmp_path, "secret")
    patterns = [b"/var/log/*.log", b"/link/tool.log", b"/etc/b.log", b"/opt/out"]
    patterns += [b"/out/secret", b"/../secret"]
    found, missing = report.collect(str(root), str(root / "home/user/job"), [*patterns, b"in"])
    assert sorted(found) == ["b.log", "in", "out", "tool.log"]
    assert Path(found["tool.log"]).read_text() == "var/log/tool.log"
    assert Path(found["out"], "x/y").read_text() == "opt/out/x/y"
    assert Path(found["b.log"]).read_text() == "var/log/b.log"
    # One file under two paths is no harm; of two files of one name, the second stays behind.
    assert missing == ["/etc/b.log", "/out/secret", "/../secret"]


def test_without_a_root_nothing_is_there(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert report.collect(str(gone), str(gone / "job"), [b"a", b"/b"]) == ({}, ["a", "/b"])


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


class Kernel:
    """wait4 as the kernel has it: `ended` are waiting, `running` is whether others are there."""

    def __init__(self, ended: list[int], running: bool) -> None:
        self.ended, self.running = ended, running
        self.asked: list[int] = []

    def wait4(self, pid: int, options: int) -> tuple[int, int, object]:
        assert pid == -1
        self.asked.append(options)
        if self.ended:
            return self.ended.pop(0), 3 << 8, "usage"
        if not self.running:
            raise ChildProcessError
        return 0, 0, None


@pytest.mark.parametrize("running", [True, False])
def test_all_that_have_ended_are_collected(monkeypatch: pytest.MonkeyPatch, running: bool) -> None:
    kernel = Kernel([5, 6], running)
    monkeypatch.setattr(os, "wait4", kernel.wait4)
    assert process.reap(os.WUNTRACED) == ([(5, 768, "usage"), (6, 768, "usage")], running)
    # It may wait for the first, never for more.
    assert kernel.asked == [os.WUNTRACED, *[os.WUNTRACED | os.WNOHANG] * 2]
    assert process.reap() == ([], running)
    assert kernel.asked[-1] == os.WNOHANG


def test_a_signal_is_128_and_its_number() -> None:
    assert [process.exit_code(status) for status in (0, 7 << 8, 9)] == [0, 7, 137]
