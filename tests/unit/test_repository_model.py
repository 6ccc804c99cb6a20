"""Indexes and maps of strangers: whatever they say, a clear error or a harmless value."""

from __future__ import annotations

import json
from typing import Any

import pytest
import zstandard
from apppot.host.common.errors import ApppotError, RepositoryError
from apppot.host.images.probe import ImageFormat
from apppot.host.repository import model, page
from apppot.host.repository.model import Blob, Chunk, ChunkMap, Index, IndexEntry, Kind
from hypothesis import given
from hypothesis import strategies as st

HEX = "0123456789abcdef" * 4


def entry(**more: Any) -> IndexEntry:
    values: dict[str, Any] = {
        "name": "base",
        "version": "1",
        "kind": Kind.IMAGE,
        "digest": HEX,
        "format": ImageFormat.SQUASHFS,
        "size": 1000,
        "map": Blob(HEX, 10),
        "command": ("true",),
        "env": {"A": "b"},
    }
    return IndexEntry(**{**values, **more})


def index(*entries: IndexEntry, serial: int = 3) -> Index:
    return Index("0" * 32, serial, "2026-01-01T00:00:00Z", entries)


def decode_with(**changed: Any) -> Index:
    raw = json.loads(index(entry()).encode())
    raw["entries"][0] |= changed
    return model.decode_index(json.dumps(raw).encode())


def test_an_index_survives_its_encoding() -> None:
    given_one = index(entry(), entry(version="2", parent=HEX, description="Größe <b>"))
    assert model.decode_index(given_one.encode()) == given_one
    assert given_one.encode() == model.decode_index(given_one.encode()).encode()


def test_the_newest_version_is_the_one_published_last() -> None:
    found = index(entry(version="9", since=1), entry(version="10", since=2)).find("base", "latest")
    assert found is not None and found.version == "10"
    assert index(entry()).find("base", "2") is None


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "../../etc/passwd"},
        {"name": "a/b"},
        {"name": ".."},
        {"name": "host"},
        {"name": "a\x1b[2J"},
        {"name": ""},
        {"name": "a" * 1000},
        {"name": 7},
        {"version": "../1"},
        {"version": "latest"},
        {"version": "1\n"},
        {"digest": "../" + HEX[3:]},
        {"digest": HEX.upper()},
        {"digest": HEX[:-1]},
        {"format": "cow"},
        {"format": "tar"},
        {"format": "../../x"},
        {"kind": "kernel"},
        {"size": 0},
        {"size": -1},
        {"size": 1 << 60},
        {"size": True},
        {"size": 1e9},
        {"map": {"digest": HEX, "size": 1 << 40}},
        {"map": {"digest": "..", "size": 1}},
        {"map": None},
        {"command": "sh"},
        {"command": ["a\0b"]},
        {"command": ["x"] * 100_000},
        {"env": {"A": 1}},
        {"env": []},
        {"parent": "../x"},
        {"description": "x" * 100_000},
        {"description": None},
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(RepositoryError, match="index is damaged"):
        decode_with(**changed)


def test_texts_lose_their_control_characters() -> None:
    found = decode_with(description="a\x1b[31m\nb\u202e").entries[0]
    assert found.description == "a?[31m?b?"


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(RepositoryError, match="twice"):
        model.decode_index(index(entry(), entry()).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"null", b"[" * 100_000, b'{"schema": 1}'])
def test_what_is_no_index_is_refused(data: bytes) -> None:
    with pytest.raises(RepositoryError):
        model.decode_index(data)


def test_a_newer_index_asks_for_a_newer_apppot() -> None:
    raw = json.loads(index(entry()).encode()) | {"schema": 2}
    with pytest.raises(RepositoryError) as caught:
        model.decode_index(json.dumps(raw).encode())
    assert "update" in caught.value.hint


MAP = ChunkMap(HEX, 300, (Blob(HEX, 500),), (Chunk(HEX, 100, 0, 0, 100), Chunk(HEX, 200, 0, 9, 8)))
IMAGE = Blob(HEX, 300)


def blob_of(data: bytes) -> Blob:
    return Blob(model.digest_of(data), len(data))


def test_a_map_survives_its_encoding() -> None:
    data = MAP.encode()
    assert model.decode_map(data, blob_of(data), IMAGE) == MAP


def test_a_corrupted_map_is_refused() -> None:
    data = MAP.encode()
    with pytest.raises(RepositoryError, match="corrupted"):
        model.decode_map(data[:-1] + b"x", blob_of(data), IMAGE)


@pytest.mark.parametrize(
    "changed",
    [
        {"digest": "f" * 64},
        {"size": 301},
        {"packs": []},
        {"packs": [[HEX, 1 << 40]]},
        {"packs": [["../../x", 500]]},
        {"chunks": [[HEX, 300, 0, 499, 300]]},
        {"chunks": [[HEX, 300, 0, -1, 300]]},
        {"chunks": [[HEX, 300, 1, 0, 300]]},
        {"chunks": [[HEX, 300, -1, 0, 300]]},
        {"chunks": [[HEX, 300, 0, 0, 301]]},
        {"chunks": [[HEX, 300, 0, 0]]},
        {"chunks": [["..", 300, 0, 0, 1]]},
        {"chunks": [[HEX, 100, 0, 0, 100]]},
        {"chunks": [[HEX, 0, 0, 0, 0]] * 3},
        {"chunks": [[HEX, 1 << 30, 0, 0, 1]]},
        {"chunks": 5},
    ],
)
def test_a_map_that_makes_no_sense_is_refused(changed: dict[str, Any]) -> None:
    text = zstandard.ZstdDecompressor().decompress(MAP.encode(), max_output_size=1 << 20)
    data = zstandard.compress(json.dumps({**json.loads(text), **changed}).encode())
    with pytest.raises(RepositoryError):
        model.decode_map(data, blob_of(data), IMAGE)


def test_a_map_that_decompresses_to_gigabytes_is_refused() -> None:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    block = bytes(1 << 20)
    data = b"".join(compressor.compress(block) for _ in range(256)) + compressor.flush()
    with pytest.raises(RepositoryError, match="damaged"):
        model.decode_map(data, blob_of(data), IMAGE)


@given(st.binary(max_size=200))
def test_noise_is_an_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(ApppotError):
        model.decode_index(data)
    with pytest.raises(ApppotError):
        model.decode_map(data, blob_of(data), IMAGE)


def test_the_page_escapes_everything() -> None:
    evil = "<script>alert(1)</script>&\"'"
    text = page.render(index(entry(description=evil, distribution=evil, command=(evil,))), [evil])
    assert "<script" not in text and "&lt;script&gt;" in text
