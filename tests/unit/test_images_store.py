"""The image store: names, digests, crashes, concurrent writers."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
from apppot.host.common.errors import ImageError
from apppot.host.images import store
from apppot.host.images.record import Record, check_name
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import STALE_SECONDS, workspace
from hypothesis import given
from hypothesis import strategies as st

from .test_images_probe import squashfs


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("APPPOT_SITE_STORE", str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "apppot" / "images"


def add(name: str, version: str = "1", content: bytes = b"") -> Record:
    with workspace() as folder:
        path = os.path.join(folder, "image")
        Path(path).write_bytes(squashfs(96) + content)
        record = Record("", name, version, "squashfs", 0, command=("true",), env={"A": "b"})
        return store.add(path, record)


def test_an_image_is_found_by_name_version_and_digest() -> None:
    first, second = add("base", "1", b"x"), add("base", "2", b"y")
    for reference in ("base:1", first.digest, "sha256:" + first.digest, first.digest[:12]):
        assert resolve(reference).digest == first.digest
    assert resolve("base").digest == second.digest
    found = resolve("base")
    assert found.record == second
    assert os.stat(found.path).st_mode & 0o777 == 0o444


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "my.sqfs").write_bytes(squashfs(96))
    for reference in ("my.sqfs", "./my.sqfs", str(tmp_path / "my.sqfs")):
        assert resolve(reference).record is None


def test_adding_twice_changes_nothing_but_names(own_store: Path) -> None:
    first, again = add("a"), add("b")
    assert first.digest == again.digest and first.created == again.created
    assert len(os.listdir(own_store / "blobs")) == 1
    assert [record.name for _, record in store.list_images()] == ["a", "b"]
    assert os.listdir(own_store / "tmp") == []


def test_the_site_store_comes_first(tmp_path: Path, own_store: Path) -> None:
    site = add("base", "1", b"site")
    (tmp_path / "site").mkdir()
    os.rename(own_store, tmp_path / "site" / "images")
    mine = add("base", "1", b"mine")
    assert resolve("base").digest == site.digest
    assert resolve(mine.digest[:10]).digest == mine.digest


def test_an_unknown_name_lists_what_is_near() -> None:
    add("debian-12", "1", b"has lost its name")
    add("debian-12")
    with pytest.raises(ImageError, match="no image 'debain-12'") as caught:
        resolve("debain-12")
    assert "did you mean debian-12" in caught.value.hint
    with pytest.raises(ImageError) as caught:
        resolve("qqqq")
    assert caught.value.hint.startswith("there are: debian-12:1; more")


def test_an_empty_store_says_how_to_fill_it() -> None:
    with pytest.raises(ImageError) as caught:
        resolve("anything")
    assert "apppot image build" in caught.value.hint


def test_a_short_digest_must_be_unique(own_store: Path) -> None:
    record = add("a")
    twin = record.digest[:10] + "0" * 54
    path = own_store / "records" / f"{record.digest}.json"
    (own_store / "records" / f"{twin}.json").write_text(path.read_text())
    with pytest.raises(ImageError, match="fits 2 images"):
        resolve(record.digest[:10])


def test_a_truncated_blob_is_noticed() -> None:
    add("a")
    path = resolve("a").path
    os.chmod(path, 0o644)
    os.truncate(path, 50)
    with pytest.raises(ImageError, match="truncated"):
        resolve("a")


def test_a_damaged_record_is_an_error_not_a_crash(own_store: Path) -> None:
    record = add("a")
    path = own_store / "records" / f"{record.digest}.json"
    for text in ("", "[]", '{"schema": 1}', '{"schema": 99}'):
        path.write_text(text)
        with pytest.raises(ImageError):
            resolve("a")


def test_a_crash_between_blob_and_record_shows_nothing_and_heals(own_store: Path) -> None:
    record = add("a")
    (own_store / "records" / f"{record.digest}.json").unlink()
    (own_store / "names" / "a" / "1.json").unlink()
    assert store.list_images() == []
    assert add("a").digest == record.digest
    assert resolve("a:1").digest == record.digest


def test_only_old_and_abandoned_work_is_swept(own_store: Path) -> None:
    for name in ("old", "young"):
        (own_store / "tmp" / name).mkdir(parents=True)
        (own_store / "tmp" / name / "image").write_bytes(b"half")
    past = time.time() - 2 * STALE_SECONDS
    os.utime(own_store / "tmp" / "old", (past, past))
    with workspace() as mine:
        os.utime(mine, (past, past))
        with workspace():
            assert os.path.isdir(mine), "a locked workspace is somebody's"
        left = set(os.listdir(own_store / "tmp"))
    assert "young" in left and "old" not in left


def test_writers_at_once_agree(own_store: Path) -> None:
    failures: list[BaseException] = []

    def write() -> None:
        try:
            add("same", "1", b"content" * 1000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(os.listdir(own_store / "blobs")) == 1
    assert resolve("same:1").record is not None
    assert not [name for name in os.listdir(own_store / "records") if "partial" in name]


def test_a_build_is_found_again_only_while_its_image_is_whole() -> None:
    record = add("a")
    key = "0" * 64
    assert store.find_build(key) is None
    store.remember_build(key, record.digest)
    assert store.find_build(key) == record
    os.unlink(resolve("a").path)
    assert store.find_build(key) is None


def test_records_are_versioned_json(own_store: Path) -> None:
    record = add("a")
    data = json.loads((own_store / "records" / f"{record.digest}.json").read_text())
    assert data["schema"] == 1


@pytest.mark.parametrize("name", ["host", "", "a/b", "..", ".a", "-a", "A", "a" * 200, "a\n"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ImageError):
        check_name(name, "1")


@given(st.text())
def test_no_reference_leaves_the_store_or_crashes(reference: str) -> None:
    try:
        image = resolve(reference)
    except ImageError:
        return
    assert image.record is None
