"""Files that appear whole or not at all: modes, versions, what a damaged one means."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from apppot.host.common import files
from apppot.host.common.errors import ImageError


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(("mode", "expected"), [(None, 0o640), (0o600, 0o600), (0o444, 0o444)])
def test_what_is_written_is_read(
    tmp_path: Path, mode: int | None, expected: int, durable: bool
) -> None:
    path = tmp_path / "deeper" / "state.json"
    before = os.umask(0o027)
    try:
        for number in range(2):
            files.write_json(str(path), {"number": number}, mode, durable=durable)
    finally:
        os.umask(before)
    assert files.read_json(str(path)) == {"version": 1, "number": 1}
    assert path.stat().st_mode & 0o777 == expected
    assert os.listdir(path.parent) == ["state.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("\xff", "cannot be read"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"version": "1"}', "damaged"),
        ('{"version": 2}', "newer"),
    ],
)
def test_damage_is_absence_or_an_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(text.encode("latin-1"))
    assert files.read_json(str(path)) is None
    with pytest.raises(ImageError, match=message):
        files.require_json(str(path), ImageError, "mend it")


def test_absence_is_no_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "file" / "none"):
        (tmp_path / "file").touch()
        assert files.read_json(str(path)) is files.require_json(str(path), ImageError, "") is None


def test_a_store_may_call_its_version_otherwise(tmp_path: Path) -> None:
    path = str(tmp_path / "state.json")
    files.write_json(path, {}, key="schema", version=3)
    assert json.loads(Path(path).read_text()) == {"schema": 3}
    assert files.require_json(path, ImageError, "", key="schema", version=3) == {"schema": 3}


def test_an_error_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "state.json")
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})

    def full(source: str, target: str) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"version": 1, "a": 1}
    assert os.listdir(tmp_path) == ["state.json"]


def test_all_is_written_however_little_is_taken_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    with open(tmp_path / "file", "w+b") as file:
        files.write_all(file.fileno(), b"0123456789")
        files.pwrite_all(file.fileno(), memoryview(b"abcdefgh")[1:], 5)
        assert os.pread(file.fileno(), 100, 0) == b"01234bcdefgh"
