"""Writing a repository: incremental, atomic, pruned; cutting and packing chunks."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
import zstandard
from apppot.host.common.errors import ApppotError, ImageError, RepositoryError
from apppot.host.images import store
from apppot.host.images.record import Record
from apppot.host.images.workspace import user_store, workspace
from apppot.host.repository import chunks, files, keys, publish, pull
from apppot.host.repository.model import Blob, Chunk, IndexEntry
from apppot.host.repository.publish import Publication

from .test_images_probe import squashfs


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("APPPOT_SITE_STORE", str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    keys.create()


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def add(name: str, version: str, content: bytes) -> Record:
    with workspace() as folder:
        path = os.path.join(folder, "image")
        Path(path).write_bytes(squashfs(96) + content)
        return store.add(path, Record("", name, version, "squashfs", 0, command=("true",)))


def run(*images: str, **more: object) -> publish.Published:
    return publish.publish("repo", Publication(images=images, **more), ["default"])  # type: ignore[arg-type]


def snapshot() -> dict[str, int]:
    """Every file of the repository with its inode and time: what is untouched stays equal."""
    found = {}
    for path in Path("repo").rglob("*"):
        if path.is_file() and path.name != "index.html":
            found[str(path)] = path.stat().st_mtime_ns
    return found


def test_a_second_version_adds_its_difference_only() -> None:
    body = noise(1, 4 << 20)
    add("base", "1", body)
    add("base", "2", body[: 1 << 20] + noise(2, 5000) + body[1 << 20 :])
    first, second = run("base:1"), run("base:2")
    assert (first.serial, second.serial) == (1, 2)
    assert first.written > 4 << 20
    assert second.written < 400_000


def test_publishing_the_same_again_changes_nothing() -> None:
    add("base", "1", noise(1, 1 << 20))
    run("base:1")
    before = snapshot()
    again = run("base:1")
    assert (again.serial, again.written) == (1, 0)
    assert snapshot() == before


def test_removed_and_published_again_finds_its_chunks_until_pruned() -> None:
    add("a", "1", noise(1, 1 << 20))
    add("b", "1", noise(2, 1 << 20))
    run("a:1", "b:1")
    run(remove=["a"])
    assert run("a:1").written == 0
    run(remove=["a"])
    assert run(prune=True).pruned >= 3
    assert run("a:1").written > 1 << 20
    with pytest.raises(RepositoryError, match="no 'c'"):
        run(remove=["c"])


def test_prune_keeps_all_that_is_referenced() -> None:
    add("a", "1", noise(1, 1 << 20))
    run("a:1")
    run("a:1", prune=True)
    index = publish.read_published("repo")
    assert index is not None
    wanted = publish.Writer("repo")
    assert wanted.add("unread", index.entries[0].digest, "a") == index.entries[0].map


@pytest.mark.parametrize("step", range(8))
def test_a_publish_that_dies_anywhere_leaves_a_whole_repository(
    step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("a", "1", noise(1, 1 << 20))
    add("b", "1", noise(2, 1 << 20))
    run("a:1")
    count = 0
    rename = os.replace

    def dying(source: str, target: str) -> None:
        nonlocal count
        count += 1
        if count > step:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(os, "replace", dying)
        context.setattr(os, "unlink", lambda path: None)  # a killed process tidies nothing
        run("b:1")
        raise KeyboardInterrupt
    index = publish.read_published("repo")
    assert index is not None and index.serial in (1, 2)
    for entry in index.entries:
        assert os.path.exists(f"repo/maps/{entry.map.digest[:2]}/{entry.map.digest}")
    run("b:1")
    assert [entry.name for entry in _entries()] == ["a", "b"]
    assert not list(Path("repo").rglob(".*.partial"))
    assert Path("repo/index.json").read_bytes() == _index_bytes()


def _entries() -> tuple[IndexEntry, ...]:
    index = publish.read_published("repo")
    assert index is not None
    return index.entries


def _index_bytes() -> bytes:
    index = publish.read_published("repo")
    assert index is not None
    return index.encode()


def test_a_tampered_folder_is_not_signed_over() -> None:
    add("a", "1", noise(1, 1 << 20))
    run("a:1")
    (path,) = Path("repo/indexes").rglob("?" * 64)
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(RepositoryError, match="changed after it was signed"):
        run("a:1")


def test_a_damaged_image_is_not_published() -> None:
    record = add("a", "1", noise(1, 1 << 20))
    path = store.blob_path(user_store(), record)
    os.chmod(path, 0o644)
    with open(path, "r+b") as handle:
        handle.seek(500_000)
        handle.write(b"rot")
    with pytest.raises(ImageError, match="damaged"):
        run("a:1")
    assert publish.read_published("repo") is None
    assert not list(Path("repo").rglob("*.partial"))


def test_changes_are_published_beside_images() -> None:
    Path("dev.squashfs").write_bytes(squashfs(96) + noise(3, 100_000))
    run(changes=["dev.squashfs", "other:2=dev.squashfs"])
    index = publish.read_published("repo")
    assert index is not None
    assert [(e.name, e.version, e.kind) for e in index.entries] == [
        ("dev", "1", "changes"),
        ("other", "2", "changes"),
    ]


def test_an_unknown_key_is_said_before_any_work() -> None:
    add("a", "1", noise(1, 1000))
    with pytest.raises(RepositoryError, match="no key 'nobody'"):
        publish.publish("repo", Publication(["a:1"]), ["nobody"])
    assert not os.path.exists("repo")


# --- chunks ------------------------------------------------------------------------------------


def test_chunks_are_the_file_and_survive_an_insertion() -> None:
    body = noise(5, 2 << 20)
    Path("one").write_bytes(body)
    Path("two").write_bytes(b"inserted" + body)
    one = [bytes(piece.data) for piece in chunks.cut("one")]
    two = [bytes(piece.data) for piece in chunks.cut("two")]
    assert b"".join(one) == body
    assert len(set(two) - set(one)) <= 2
    assert max(map(len, one)) <= chunks.LONGEST


def test_the_cutting_is_part_of_the_format() -> None:
    """Other boundaries would share nothing with what is published: never change this number."""
    Path("fixed").write_bytes(noise(7, 1 << 20))
    lengths = repr([len(piece.data) for piece in chunks.cut("fixed")]).encode()
    assert hashlib.sha256(lengths).hexdigest()[:16] == "6dbed0b2f22046c1"


def test_what_does_not_shrink_stays_as_it_is() -> None:
    packing, unpacking = chunks.Packing(), chunks.Unpacking()
    for data in (noise(1, 10_000), bytes(10_000)):
        packed = bytes(packing.pack(data))
        assert (packed == data) == (data != bytes(10_000))
        digest = hashlib.sha256(data).hexdigest()
        assert unpacking.unpack(packed, digest, len(data)) == data


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"short",
        zstandard.compress(bytes(1 << 28)),
        zstandard.compress(b"x" * 1000)[:-3],
        zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 1000),
        zstandard.compress(b"y" * 1000),
    ],
)
def test_a_chunk_that_is_not_what_it_should_be(stored: bytes) -> None:
    digest = hashlib.sha256(b"x" * 1000).hexdigest()
    with pytest.raises(chunks.Corrupted):
        chunks.Unpacking().unpack(stored, digest, 1000)


def test_local_chunks_come_from_any_image_and_are_verified() -> None:
    body = noise(9, 1 << 20)
    record = add("a", "1", body)
    local = chunks.local_chunks("other", "", 1 << 20)
    rows = chunks.read_rows(record.digest)
    assert rows is not None and all(local.read(digest) is not None for digest, _ in rows)
    local.close()
    path = store.blob_path(user_store(), record)
    os.chmod(path, 0o644)
    Path(path).write_bytes(squashfs(96) + noise(10, 1 << 20))
    local = chunks.local_chunks("other", "", 1 << 20)
    assert all(local.read(digest) is None for digest, _ in rows)
    local.close()


# --- requests ----------------------------------------------------------------------------------


def chunk(number: int, offset: int, size: int = 1000, pack: int = 0) -> Chunk:
    return Chunk(f"{number:064x}", size, pack, offset, size)


PACKS = [Blob("a" * 64, 1 << 26), Blob("b" * 64, 1 << 26)]


def test_neighbours_are_one_request() -> None:
    wanted = [chunk(n, n * 1000) for n in range(10)]
    (span,) = pull.plan_spans(wanted, PACKS)
    assert span.chunks == wanted and span.end == 10_000


def test_gaps_packs_and_length_divide_requests() -> None:
    wanted = [chunk(0, 0), chunk(1, 1000 + pull.GAP_BYTES), chunk(2, 10 << 20), chunk(3, 0, pack=1)]
    spans = pull.plan_spans(wanted, PACKS)
    assert [len(span.chunks) for span in spans] == [2, 1, 1]
    many = [chunk(n, n * 100_000, 100_000) for n in range(100)]
    assert all(s.end - s.chunks[0].offset <= pull.SPAN_BYTES for s in pull.plan_spans(many, PACKS))


def test_chunks_that_overlap_are_not_one_stream() -> None:
    """A hostile map may say so."""
    spans = pull.plan_spans([chunk(0, 0), chunk(1, 500)], PACKS)
    assert len(spans) == 2


def test_requests_go_by_the_images_order() -> None:
    spans = pull.plan_spans([chunk(0, 9 << 20), chunk(1, 0)], PACKS)
    assert [span.chunks[0].offset for span in spans] == [9 << 20, 0]


@pytest.mark.parametrize(
    ("reference", "urls", "found"),
    [
        ("a", ["http://x/r/"], ("a", "latest", ("http://x/r",))),
        ("http://y:80/p/a:2", ["http://x"], ("a", "2", ("http://y:80/p", "http://x"))),
    ],
)
def test_references(reference: str, urls: list[str], found: tuple[object, ...]) -> None:
    wish = pull.parse(reference, urls)
    assert (wish.name, wish.version, wish.urls) == found


@pytest.mark.parametrize("reference", ["", "..", "http://x/../a b", "ftp://x/a", "a:b/c", "host"])
def test_references_that_are_none(reference: str) -> None:
    with pytest.raises(ApppotError):
        pull.parse(reference, ["http://x"])


def test_state_of_a_newer_version_is_not_overwritten() -> None:
    files.write_state("./s.json", {"schema": 99})
    with pytest.raises(RepositoryError, match="newer"):
        files.read_state("./s.json")
