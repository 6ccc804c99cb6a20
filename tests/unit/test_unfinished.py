"""Work that is not whole yet: what stays, what a kill leaves, and what is not ours."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from apppot.host.common import unfinished

KILLED = ".out.0123456789abcdef"


def left_by_a_kill(place: Path, name: str = KILLED) -> None:
    (place / name).write_text("half")
    (place / f"{name}.lock").touch()


def test_what_is_renamed_stays(tmp_path: Path) -> None:
    with unfinished.making(str(tmp_path), "out") as work:
        Path(work).write_text("whole")
        os.rename(work, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_what_fails_goes(tmp_path: Path) -> None:
    with pytest.raises(ValueError), unfinished.making(str(tmp_path), "out") as work:
        Path(work).mkdir()
        Path(work, "half").touch()
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_only_what_was_left_is_swept(tmp_path: Path) -> None:
    left_by_a_kill(tmp_path)
    (tmp_path / ".out.fedcba9876543210.lock").touch()  # killed before it made anything
    others = {".out.0000000000000000", ".out.lock", ".out.mine.lock", "out"}
    for name in others:
        (tmp_path / name).write_text("a user's")
    left_by_a_kill(tmp_path, ".another.0123456789abcdef")
    with unfinished.making(str(tmp_path), "out") as work:
        Path(work).touch()
        unfinished.sweep(str(tmp_path), "out")
        assert os.path.exists(work)
    left = set(os.listdir(tmp_path))
    assert left == others | {".another.0123456789abcdef", ".another.0123456789abcdef.lock"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "none here")

    monkeypatch.setattr(fcntl, "flock", none)
    left_by_a_kill(tmp_path)
    unfinished.sweep(str(tmp_path), "out")
    assert (tmp_path / KILLED).exists(), "who could know"
    with unfinished.making(str(tmp_path), "out") as work:
        os.mkdir(work)
    assert not os.path.exists(work)
