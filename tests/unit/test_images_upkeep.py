"""Removing, pruning, verifying and tagging images; what is in use stays."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from apppot.host.common.errors import ImageError
from apppot.host.images import store, upkeep
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import hold

from .test_images_store import add

__all__ = ["own_store"]


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("APPPOT_SITE_STORE", str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "apppot" / "images"


def blobs(place: Path) -> list[str]:
    return sorted(os.listdir(place / "blobs"))


def test_the_file_goes_with_its_last_name(own_store: Path) -> None:
    record = add("a")
    add("b")
    assert upkeep.remove(["a"]).names == ("a:1",)
    assert resolve("b").digest == record.digest
    upkeep.remove(["b"])
    assert blobs(own_store) == [] and store.list_images() == []
    assert os.listdir(own_store / "names") == []


def test_latest_goes_back_to_what_is_left() -> None:
    first, _ = add("a", "1", b"x"), add("a", "2", b"y")
    with pytest.raises(ImageError, match="a:1, a:2"):
        upkeep.remove(["a"])
    upkeep.remove(["a:2"])
    assert resolve("a").digest == first.digest


def test_all_versions_and_digests() -> None:
    add("a", "1", b"x")
    add("a", "2", b"y")
    digest = add("b", "1", b"z").digest
    assert upkeep.remove(["a:*", digest[:12]]).names == ("a:1", "a:2", "b:1")
    assert store.list_images() == []


def test_nothing_is_removed_when_one_is_missing() -> None:
    add("a")
    with pytest.raises(ImageError):
        upkeep.remove(["a", "nope"])
    assert resolve("a")


def test_an_image_in_use_keeps_its_file_until_prune(own_store: Path) -> None:
    add("a")
    held = hold(resolve("a").path)
    removed = upkeep.remove(["a"])
    assert len(removed.kept) == 1 and len(blobs(own_store)) == 1
    assert upkeep.prune().kept
    os.close(held)
    assert not upkeep.prune().kept
    assert blobs(own_store) == []


def test_on_nfs_the_lock_needs_a_writer(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add("a")
    path = resolve("a").path
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        if how & fcntl.LOCK_EX and access == os.O_RDONLY:
            raise OSError(errno.EBADF, "as NFS says it")
        real(descriptor, how)

    held = hold(path)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert upkeep.remove(["a"]).kept
    assert os.stat(path).st_mode & 0o777 == 0o444
    os.close(held)
    assert not upkeep.prune().kept
    assert blobs(own_store) == []


def test_an_image_that_vanished_is_said(own_store: Path) -> None:
    add("a")
    path = resolve("a").path
    os.unlink(path)
    with pytest.raises(ImageError, match="cannot be read"):
        hold(path)


def test_prune_removes_what_crashes_left(own_store: Path) -> None:
    kept = add("a", "1", b"kept")
    lost = add("b", "1", b"lost")
    (own_store / "records" / f"{lost.digest}.json").unlink()
    (own_store / "names" / "a" / ".x.partial").write_text("half")
    store.remember_build("k" * 64, lost.digest)
    upkeep.prune()
    assert blobs(own_store) == [f"{kept.digest}.squashfs"]
    assert os.listdir(own_store / "builds") == []
    assert resolve("a").digest == kept.digest


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_crash_at_any_step_of_rm_leaves_no_half_image(
    steps: int, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("a", "1", b"x")
    other = add("a", "2", b"y")
    left = steps

    def counted(real: object) -> object:
        def call(*args: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return real(*args)  # type: ignore[operator]

        return call

    monkeypatch.setattr(os, "unlink", counted(os.unlink))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    try:
        upkeep.remove(["a:1"])
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    monkeypatch.setenv("XDG_DATA_HOME", str(own_store.parent.parent))
    monkeypatch.setenv("APPPOT_SITE_STORE", str(own_store / "none"))
    for _, record in store.list_images():
        if record.version:
            assert resolve(f"{record.name}:{record.version}")
    assert resolve("a").digest
    upkeep.prune()
    assert resolve("a:2").digest == other.digest
    assert upkeep.verify([]) == []


def test_verify_names_what_is_damaged() -> None:
    add("good", "1", b"x")
    add("bad", "1", b"y")
    path = resolve("bad").path
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(96)
        file.write(b"Y")
    problems = upkeep.verify([])
    assert [label for label, _ in problems] == ["bad:1"]
    assert upkeep.verify(["good"]) == []
    with pytest.raises(ImageError):
        upkeep.verify(["nope"])


def test_a_tag_is_a_name_of_its_own() -> None:
    record = add("a")
    add("taken", "1", b"other")
    assert upkeep.tag("a", "b:7").digest == record.digest
    assert resolve("b").record == resolve("b:7").record
    with pytest.raises(ImageError, match="already the name"):
        upkeep.tag("a", "taken:1")
    upkeep.tag("a", "taken:1", force=True)
    assert resolve("taken").digest == record.digest


def test_a_tag_of_the_sites_image_copies_it(tmp_path: Path, own_store: Path) -> None:
    record = add("a")
    (tmp_path / "site").mkdir()
    os.rename(own_store, tmp_path / "site" / "images")
    upkeep.tag("a", "mine")
    assert blobs(own_store) == [f"{record.digest}.squashfs"]
    with pytest.raises(ImageError, match="not in your store"):
        upkeep.remove(["a"])


def test_sizes_like_du() -> None:
    add("alone", "1", b"x" * 10000)
    add("a", "1", b"y" * 10000)
    add("b", "1", b"y" * 10000)
    sizes = {name: size for (_, name, _), size in upkeep.sizes().items()}
    assert sizes["alone"].unique > 0 and sizes["alone"].shared == 0
    assert sizes["a"].unique == 0 and sizes["a"].shared == sizes["b"].shared > 0
    assert upkeep.total() == sizes["alone"].unique + sizes["a"].shared


def test_names_from_before_they_had_records_work(own_store: Path) -> None:
    record = add("a")
    for word in ("1", "latest"):
        path = own_store / "names" / "a" / f"{word}.json"
        path.write_text(json.dumps({"schema": 1, "digest": record.digest}))
    assert resolve("a").record == record
    assert [item.version for _, item in store.list_images()] == ["1"]
