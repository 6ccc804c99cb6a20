"""Imports of file systems, names and refusals; what needs sqfstar is with the tools' tests."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from apppot.host.commands import image
from apppot.host.common.errors import ApppotError, ImageError, UsageError
from apppot.host.common.text import printable
from apppot.host.common.units import format_size
from apppot.host.images import pack, store
from apppot.host.images.importing import importer
from apppot.host.images.record import valid_name
from apppot.host.images.resolve import resolve

from .test_images_probe import cow, ext, squashfs

MEBI = 1 << 20


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("APPPOT_SITE_STORE", str(tmp_path / "site"))
    monkeypatch.setattr(pack, "distribution", lambda path: "")
    return tmp_path / "data" / "apppot" / "images"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/x/Debian-12.tar.gz", "debian-12"),
        ("my image.EXT4", "my-image"),
        ("v1.2.tar.zst", "v1.2"),
        ("...", "image"),
        ("Übung.sqfs", "bung"),
    ],
)
def test_default_names(path: str, name: str) -> None:
    assert importer.default_name(path) == name
    assert valid_name(name)


def test_a_sparse_ext4_stays_sparse_and_exact(tmp_path: Path) -> None:
    path = tmp_path / "disk.ext4"
    with open(path, "wb") as handle:
        handle.write(ext(64 * 256))
        handle.seek(40 * MEBI + 5)
        handle.write(b"data in the middle")
        handle.truncate(64 * MEBI)
    record = importer.import_file(str(path), command=("run", "me"))
    found = resolve("disk")
    assert record.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Path(found.path).read_bytes() == path.read_bytes()
    assert os.stat(found.path).st_blocks * 512 < 8 * MEBI
    assert found.record is not None and found.record.command == ("run", "me")


def test_a_name_moves_only_by_force(tmp_path: Path) -> None:
    (tmp_path / "a.sqfs").write_bytes(squashfs(96))
    (tmp_path / "b.sqfs").write_bytes(squashfs(96) + b"other")
    first = importer.import_file(str(tmp_path / "a.sqfs"), "x:1")
    with pytest.raises(ImageError, match="already the name of another") as caught:
        importer.import_file(str(tmp_path / "b.sqfs"), "x:1")
    assert "--force" in caught.value.hint
    assert resolve("x:1").digest == first.digest
    moved = importer.import_file(str(tmp_path / "b.sqfs"), "x:1", force=True)
    assert resolve("x").digest == moved.digest != first.digest


def test_names_of_one_content_keep_their_own_command(tmp_path: Path) -> None:
    path = tmp_path / "a.sqfs"
    path.write_bytes(squashfs(96))
    for name in ("one", "two"):
        importer.import_file(str(path), name, ("run", name))
    for name in ("one", "two"):
        record = resolve(name).record
        assert record is not None
        assert (record.name, record.command) == (name, ("run", name))


def test_importing_again_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "a.sqfs"
    path.write_bytes(squashfs(96))
    first = importer.import_file(str(path), "x:1")
    assert importer.import_file(str(path), "x:1") == first


def test_refusals_leave_nothing(tmp_path: Path, own_store: Path) -> None:
    path = tmp_path / "bad"
    for content, problem in (
        (squashfs(5000), "truncated"),
        (cow(3, b"/base"), "COW file"),
        (bytes(32) + b"SIF_MAGIC\x00" + bytes(86), "sif"),
        (ext(1, incompat=0x244) + bytes(2048), "journal"),
        (b"", "empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(ImageError, match=problem):
            importer.import_file(str(path))
    assert store.list_images() == []
    assert os.listdir(own_store / "tmp") == []


def test_standard_input_needs_a_name() -> None:
    with pytest.raises(UsageError, match="needs a name"):
        importer.import_file("-")


def test_commands_as_words_or_json() -> None:
    assert image.parse_command("a 'b c'") == ("a", "b c")
    assert image.parse_command('["a", "b c"]') == ("a", "b c")
    assert image.parse_command("") == ()
    for text in ("[1]", "'open", "[oops"):
        with pytest.raises(ApppotError):
            image.parse_command(text)


def test_sizes_for_people() -> None:
    assert [format_size(size) for size in (7, 1536, 5 << 30)] == ["7 B", "1.5 KiB", "5.0 GiB"]


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31m\n") == "a?[31m?"
