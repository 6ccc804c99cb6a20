"""Changes without a machine: the record behind the file system, joining trees, names."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from apppot.guest.merge.image import check_names
from apppot.guest.merge.overlay import Overlay, is_opaque, walk
from apppot.host.common.errors import ImageError
from apppot.host.images.changes import record as changes
from apppot.host.images.changes.record import Changes
from hypothesis import given, settings
from hypothesis import strategies as st

MARK = b"APPPOT-CHANGES\x00\x01"
texts = st.text(max_size=50)
records = st.builds(Changes, texts, texts, texts, st.lists(texts, max_size=4).map(tuple))


def sealed(path: Path, text: bytes, length: int | None = None) -> str:
    """A file system, and behind it what claims to be a record."""
    size = len(text) if length is None else length
    path.write_bytes(bytes(4096) + text + struct.pack("<I16s", size, MARK))
    return str(path)


@settings(deadline=None)
@given(records, st.binary(max_size=100))
def test_a_record_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, record: Changes, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("r") / "it.changes"
    path.write_bytes(content)
    changes.seal(str(path), record)
    assert changes.read(str(path)) == record
    assert path.read_bytes().startswith(content)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_none_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    folder = tmp_path_factory.mktemp("b")
    (folder / "plain").write_bytes(text)
    assert changes.read(str(folder / "plain")) is None
    for length in (None, 0, 1 << 31, len(text) + 1):
        try:
            found = changes.read(sealed(folder / "sealed", text, length))
        except ImageError:
            continue
        assert isinstance(found, Changes)


GOOD: dict[str, Any] = {"version": 1, "base": "b", "image": "i", "created": "c", "over": []}


@pytest.mark.parametrize(
    "value",
    [
        b"[" * 200_000,
        b'{"a":' * 100_000 + b"1",
        b"1" * 10_000,
        b"NaN",
        json.dumps({**GOOD, "version": 2}).encode(),
        json.dumps({**GOOD, "base": 7}).encode(),
        json.dumps({**GOOD, "image": ["x"]}).encode(),
        json.dumps({**GOOD, "over": "abc"}).encode(),
        json.dumps({**GOOD, "over": [1]}).encode(),
        json.dumps({**GOOD, "more": 1}).encode(),
        b'{"version": 1, "base": "\xff"}',
    ],
)
def test_hostile_records_are_errors(tmp_path: Path, value: bytes) -> None:
    with pytest.raises(ImageError, match="damaged"):
        changes.read(sealed(tmp_path / "x.changes", value))


def test_a_strangers_words_cannot_steer_a_terminal(tmp_path: Path) -> None:
    evil = {**GOOD, "image": "\x1b]0;owned\x07", "base": "\x9b31m" + "b" * 5000}
    record = changes.read(sealed(tmp_path / "x.changes", json.dumps(evil).encode()))
    assert record is not None
    with pytest.raises(ImageError) as caught:
        changes.check_base("x.changes", record, "d" * 64, "mine")
    assert all(letter.isprintable() or letter == "\n" for letter in str(caught.value))
    assert len(str(caught.value)) < 1000


# -- trees ---------------------------------------------------------------------------------------

# Path -> contents; None: a directory.  Few names, so that trees meet.
paths = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map("/".join)
trees = st.dictionaries(paths, st.none() | st.binary(max_size=5), max_size=8)


def plant(root: Path, tree: dict[str, bytes | None]) -> None:
    """Make the tree; what stands in another's way is left out."""
    root.mkdir()
    for name, content in sorted(tree.items()):
        place = root / name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                place.mkdir(exist_ok=True)
            else:
                place.write_bytes(content)
        except OSError:
            continue


def harvest(root: Path) -> dict[str, bytes | None]:
    return {
        os.path.relpath(path, root): None if os.path.isdir(path) else Path(path).read_bytes()
        for path in walk(str(root))
    }


def over(lower: dict[str, bytes | None], upper: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """What overlayfs shows of two trees without whiteouts."""
    shown = dict(lower)
    for name, content in upper.items():
        if content is not None or shown.get(name) is not None:
            shown = {k: v for k, v in shown.items() if k != name and not k.startswith(f"{name}/")}
        shown[name] = content
    return shown


@pytest.mark.skipif(os.getuid() != 0, reason="owners, and the mark of a replaced directory")
@settings(deadline=None)
@given(trees, trees)
def test_joined_trees_are_as_overlayfs_shows_them(
    tmp_path_factory: pytest.TempPathFactory,
    lower: dict[str, bytes | None],
    upper: dict[str, bytes | None],
) -> None:
    folder = tmp_path_factory.mktemp("t")
    plant(folder / "lower", lower)
    plant(folder / "upper", upper)
    (folder / "joined").mkdir()
    for name in ("lower", "upper"):
        Overlay(str(folder / name), str(folder / "joined")).apply()
    want = over(harvest(folder / "lower"), harvest(folder / "upper"))
    assert harvest(folder / "joined") == want
    # A directory over a file of the lower tree hides what the base may have there.
    for name, content in harvest(folder / "upper").items():
        was_file = harvest(folder / "lower").get(name) is not None
        if content is None and was_file:
            assert is_opaque(str(folder / "joined" / name))


def test_a_name_that_would_be_cut_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / ("n" * 254)).touch()
    check_names(os.fsencode(tmp_path))
    (tmp_path / "d" / ("\x1b" * 255)).touch()
    with pytest.raises(OSError, match="more than 254 bytes") as caught:
        check_names(os.fsencode(tmp_path))
    assert "\x1b" not in str(caught.value)
