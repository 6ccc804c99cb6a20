"""The tree that tar layers make: whiteouts, links, duplicates, and what hostile archives try."""

from __future__ import annotations

import tarfile
from typing import Any

import pytest
from apppot.host.common.errors import ImageError
from apppot.host.images.importing import layers
from apppot.host.images.importing.layers import Tree
from hypothesis import given
from hypothesis import strategies as st

DIR, LINK, HARD = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def member(name: str, kind: bytes = tarfile.REGTYPE, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def tree(*stack: list[tarfile.TarInfo], whiteouts: bool = True) -> Tree:
    made = Tree()
    for layer in stack:
        made.start_layer(whiteouts=whiteouts)
        for item in layer:
            made.add(item)
    return made


def names(made: Tree) -> list[str]:
    return [entry.path for entry in made.entries() if entry.path]


def test_the_last_of_two_members_wins() -> None:
    made = tree([member("a", size=1), member("a", size=2), member("b", DIR), member("b")])
    found = {entry.path: entry.node for entry in made.entries()}
    assert (found["a"].size, found["a"].place) == (2, (0, 1))
    assert found["b"].kind == tarfile.REGTYPE


def test_missing_parents_are_made_and_later_members_describe_them() -> None:
    made = tree([member("a/b/c"), member("a", DIR, mode=0o700, uid=5)])
    found = {entry.path: entry.node for entry in made.entries()}
    assert list(found) == ["", "a", "a/b", "a/b/c"]
    assert (found["a"].mode, found["a"].uid, found["a/b"].mode) == (0o700, 5, 0o755)
    assert found["a/b"].mtime == 0


def test_whiteouts_hide_lower_layers_only() -> None:
    lower = [member("d", DIR), member("d/a"), member("d/b"), member("x/y"), member("gone/z")]
    upper = [member("d/a"), member("d/.wh.a"), member("d/.wh.b"), member(".wh.gone")]
    assert names(tree(lower, upper)) == ["d", "x", "d/a", "x/y"]
    # A directory that is hidden and made anew has nothing of the old one.
    assert names(tree(lower, [member("x/new"), member(".wh.x")])) == [
        *("d", "gone", "x", "d/a", "d/b", "gone/z", "x/new"),
    ]


def test_an_opaque_directory_keeps_what_its_own_layer_has() -> None:
    lower = [member("d/old"), member("d/sub/old")]
    for upper in (
        [member("d/.wh..wh..opq"), member("d/new")],
        [member("d/new"), member("d/.wh..wh..opq")],
    ):
        assert names(tree(lower, upper)) == ["d", "d/new"]


def test_whiteouts_are_names_like_others_in_a_plain_archive() -> None:
    assert names(tree([member("a"), member(".wh.a")], whiteouts=False)) == [".wh.a", "a"]


def test_symbolic_links_are_followed_inside_the_root() -> None:
    made = tree(
        [
            *(member("lib", LINK, linkname="/usr/lib"), member("usr/lib", DIR)),
            *(member("up", LINK, linkname="../../../../usr"), member("lib/a"), member("up/b")),
        ]
    )
    assert names(made) == ["lib", "up", "usr", "usr/b", "usr/lib", "usr/lib/a"]


def test_a_hard_link_survives_its_first_name() -> None:
    made = tree([member("a", size=9), member("b", HARD, linkname="a")], [member(".wh.a")])
    (entry,) = [entry for entry in made.entries() if entry.path]
    assert (entry.path, entry.link, entry.node.place) == ("b", None, (0, 0))


def test_hard_links_across_layers() -> None:
    made = tree([member("a")], [member("z/b", HARD, linkname="./a")])
    found = {entry.path: entry.link for entry in made.entries()}
    assert found == {"": None, "a": None, "z": None, "z/b": "a"}


@pytest.mark.parametrize(
    "attack",
    [
        [member("../etc/passwd")],
        [member("a/../../b")],
        [member("a/..")],
        [member("l", HARD, linkname="../../etc/shadow")],
        [member("l", HARD, linkname="nowhere")],
        [member("d", DIR), member("l", HARD, linkname="d")],
        [member("l", LINK, linkname="l"), member("l/x")],
        [member("f"), member("f/x")],
        [member("n\0n")],
        [member("l", LINK, linkname="")],
        [member("s", size=1 << 60)],
        [member("/".join(["d"] * 2000))],
        [member("n" * 300)],
        [member("u", uid=-5)],
        [member("u", gid=1 << 40)],
        [member("dev", tarfile.CHRTYPE, devmajor=1 << 30)],
        [member("odd", b"Q")],
        [member(".", tarfile.REGTYPE)],
        [member(".wh...")],
        [member("d/.wh.")],
    ],
)
def test_attacks_are_errors(attack: list[tarfile.TarInfo]) -> None:
    with pytest.raises(ImageError):
        tree(attack)


def test_absolute_names_lie_in_the_image() -> None:
    assert names(tree([member("/etc/passwd"), member("//x")])) == ["etc", "x", "etc/passwd"]


def test_a_symbolic_link_does_not_lead_out() -> None:
    made = tree([member("out", LINK, linkname="/../../tmp"), member("out/evil")])
    assert names(made) == ["out", "tmp", "tmp/evil"]


def test_the_number_of_members_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "MAX_MEMBERS", 10)
    with pytest.raises(ImageError, match="more than 10 members"):
        tree([member(f"f{number}") for number in range(11)])


def test_messages_have_no_control_characters() -> None:
    with pytest.raises(ImageError) as caught:
        tree([member("../\x1b[31mred\n")])
    assert "\x1b" not in caught.value.cause and "\n" not in caught.value.cause


WORD = st.sampled_from(["a", "b", "c", ".wh.a", ".wh..wh..opq", "..", ".", ""])
PATH = st.lists(WORD, min_size=1, max_size=4).map("/".join)
KIND = st.sampled_from([tarfile.REGTYPE, DIR, LINK, HARD, tarfile.FIFOTYPE, b"V", b"D"])
MEMBER = st.builds(lambda n, k, t: member(n, k, linkname=t), PATH, KIND, PATH)


@given(st.lists(st.lists(MEMBER, max_size=6), max_size=3))
def test_whatever_comes_gives_a_tree_or_an_error(stack: list[list[tarfile.TarInfo]]) -> None:
    try:
        made = tree(*stack)
    except ImageError:
        return
    seen: set[str] = set()
    for entry in made.entries():
        parent, _, _ = entry.path.rpartition("/")
        assert not entry.path or parent in seen | {""}, "directories come first"
        assert ".." not in entry.path.split("/")
        assert entry.link is None or entry.link in seen
        seen.add(entry.path)
