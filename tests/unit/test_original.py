"""The original's command line and its COW files, without a machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from apppot.host.common.errors import ImageError, UsageError
from apppot.host.images.probe import ImageFormat, probe
from apppot.host.original import cow
from apppot.host.original.start import parse, split_pair
from hypothesis import given
from hypothesis import strategies as st


def test_every_option_has_its_place() -> None:
    line = "--image i --changes c --merge d --mem 1G --uml k --slirp s --id n -X a=1 --extra b=2"
    options = parse([*line.split(), "--extra", "c d", "prog", "--mem", "2"])
    assert (options.image, options.memory, options.kernel, options.name) == ("i", "1G", "k", "n")
    assert options.changes == ["c", "d"]
    assert options.extra == ["a=1", "b=2", "c", "d"]
    assert options.command == ["prog", "--mem", "2"]


@pytest.mark.parametrize("word", ["--uml", "--linux", "--kernel"])
def test_the_kernel_has_three_names(word: str) -> None:
    assert parse([word, "k"]).kernel == parse([f"{word}=k"]).kernel == "k"


def test_the_network_helper_needs_no_path() -> None:
    assert parse(["--slirp", "--mem", "1", "x"]).command == ["x"]
    assert parse(["--slirp", "path", "x"]).command == ["x"]
    assert parse(["--slirp"]).command == []


def test_what_is_behind_two_dashes_is_the_command() -> None:
    assert parse(["--mem", "1", "--", "--mem"]).command == ["--mem"]
    assert parse(["-"]).command == ["-"]


@pytest.mark.parametrize("words", [["--ap", "x"], ["-x"], ["--mem"], ["--slrp"]])
def test_a_wrong_option_is_an_error(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse(words)


@given(st.lists(st.text().filter(lambda word: "\0" not in word)))
def test_no_command_is_taken_apart(words: list[str]) -> None:
    assert parse(["--mem", "1", "--", *words]).command == words


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("name", None),
        ("name:1", None),
        ("dir/image", None),
        ("a,b", ("a", "b")),
        ("a:./b", ("a", "./b")),
        ("/x/a:/y/b", ("/x/a", "/y/b")),
        ("a:there", ("a", "there")),
        ("with:colon", None),
    ],
)
def test_a_pair_is_told_from_an_image(
    text: str, pair: tuple[str, str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").write_bytes(b"x")
    (tmp_path / "with:colon").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert split_pair(text) == pair


# -- COW files ---------------------------------------------------------------------------------


def test_a_cow_file_is_what_the_probe_knows(tmp_path: Path) -> None:
    image, made = tmp_path / "image", tmp_path / "cow"
    image.write_bytes(os.urandom(5000))
    cow.prepare(str(made), str(image))
    found = probe(str(made))
    assert found.format is ImageFormat.COW
    assert (found.detail, found.backing) == ("version 3", str(image))
    # Header, one sector of bitmap and the data, each at a multiple of 4096.
    assert made.stat().st_size == 8192 + 4096 + 5000
    cow.prepare(str(made), str(image))
    cow.name_backing(str(made), "/elsewhere")
    assert probe(str(made)).backing == "/elsewhere"


def test_a_cow_file_of_another_image_is_refused(tmp_path: Path) -> None:
    image, made = tmp_path / "image", tmp_path / "cow"
    image.write_bytes(bytes(4096))
    cow.prepare(str(made), str(image))
    image.write_bytes(bytes(8192))
    with pytest.raises(ImageError, match="another state"):
        cow.prepare(str(made), str(image))
    other = tmp_path / "other"
    other.write_bytes(b"hsqs" + bytes(4096))
    with pytest.raises(ImageError):
        cow.prepare(str(other), str(image))
    assert other.read_bytes() == b"hsqs" + bytes(4096)
