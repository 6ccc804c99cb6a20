"""Files from a guest that is not trusted: what its frames may do to this host's files."""

from __future__ import annotations

import json
import os
import stat
import struct
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apppot.guest.protocol import frames
from apppot.host.channel.outputs import Returned, checked_entry, checked_path
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and not set(name) & {0, 47}
)
BROKEN = (frames.FrameError, ValueError, KeyError, TypeError, struct.error, RecursionError)


def b64(data: bytes) -> str:
    return b64encode(data).decode()


class Guest:
    """Sends frames to a real receiver over a directory."""

    def __init__(self, top: Path) -> None:
        self.top, self.place = top, top / "job"
        self.place.mkdir()
        (top / "secret").write_text("untouched")
        self.sent: list[bytes] = []
        self.files = Returned(str(self.place), self.sent.append)

    def begin(self, path: bytes, number: int = 1, kind: str = "file", **more: Any) -> None:
        head = {"id": number, "kind": kind, "path": b64(path), "mode": 0o644, "mtime": 0, **more}
        self.files.frame(frames.FILE, json.dumps(head).encode())

    def data(self, data: bytes, offset: int = 0, number: int = 1) -> None:
        self.files.frame(frames.FILE_DATA, frames.PIECE.pack(number, offset) + data)

    def end(self, number: int = 1, **more: Any) -> None:
        self.files.frame(frames.FILE_END, json.dumps({"id": number, **more}).encode())

    def file(self, path: bytes, data: bytes = b"new", **more: Any) -> None:
        self.begin(path, size=len(data), **more)
        self.data(data)
        self.end()

    def tree(self) -> dict[str, bytes]:
        """What lies in and beside the directory."""
        found = {}
        for path in self.top.rglob("*"):
            if path.is_symlink():
                found[str(path.relative_to(self.top))] = os.readlink(os.fsencode(path))
            elif path.is_file():
                found[str(path.relative_to(self.top))] = path.read_bytes()
        return found


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    made.files.close()
    assert (tmp_path / "secret").read_text() == "untouched"


# -- paths -----------------------------------------------------------------------------------------


@given(st.lists(NAMES, min_size=1, max_size=10))
def test_good_paths(names: list[bytes]) -> None:
    assert checked_path(b64(b"/".join(names))) == tuple(names)


@given(st.binary(max_size=60))
def test_any_path_stays_below(path: bytes) -> None:
    """Whatever is accepted means, joined to a directory, a place below it."""
    try:
        parts = checked_path(b64(path))
    except frames.FrameError:
        return
    normal = os.path.normpath(os.path.join(b"/a/b", path))
    assert normal == os.path.join(b"/a/b", *parts)
    assert normal.startswith(b"/a/b/")
    assert b"\0" not in normal


@given(st.lists(NAMES | st.sampled_from([b"..", b".", b""]), min_size=1, max_size=6))
def test_odd_components(names: list[bytes]) -> None:
    if {b"..", b".", b""} & set(names):
        with pytest.raises(frames.FrameError):
            checked_path(b64(b"/".join(names)))


@pytest.mark.parametrize(
    "path",
    [
        b"", b"/", b"/etc/passwd", b"..", b"../x", b"a/../../x", b"a/", b"a//b", b"./a", b"a\0b",
        b"x" * 256, b"/".join([b"x" * 200] * 21),
    ],
)  # fmt: skip
def test_bad_paths(guest: Guest, path: bytes) -> None:
    with pytest.raises(frames.FrameError):
        guest.begin(path)


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(
        st.sampled_from(["id", "kind", "path", "mode", "mtime", "size", "target"]), inner
    ),
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_an_entry_or_an_error(payload: bytes) -> None:
    try:
        entry = checked_entry(payload)
    except BROKEN:
        return
    assert 0 <= entry.mode <= 0o7777
    assert 0 <= entry.size <= 1 << 62


# -- files -----------------------------------------------------------------------------------------


def test_file_appears_when_it_is_complete(guest: Guest) -> None:
    (guest.place / "out").write_text("before")
    before = guest.tree()
    guest.begin(b"out", size=6, mode=0o6751, mtime=1_000_000_000_123_456_789)
    guest.data(b"aft")
    assert guest.tree() == before
    guest.data(b"er!", 3)
    assert guest.tree() == before
    guest.end()
    assert (guest.place / "out").read_bytes() == b"after!"
    found = (guest.place / "out").stat()
    assert (found.st_mode & 0o7777, found.st_mtime_ns) == (0o751, 1_000_000_000_123_456_789)
    assert os.listdir(guest.place) == ["out"]


def test_holes(guest: Guest) -> None:
    guest.begin(b"sparse", size=10 << 20)
    guest.data(b"middle", 5 << 20)
    guest.end()
    data = (guest.place / "sparse").read_bytes()
    assert (len(data), data.strip(b"\0")) == (10 << 20, b"middle")
    assert (guest.place / "sparse").stat().st_blocks < 100


def test_directories_and_links(guest: Guest) -> None:
    guest.begin(b"d", 1, "directory", mode=0o2500, mtime=10**18)
    guest.file(b"d/e/f")
    guest.begin(b"d/l", 3, "link", target=b64(b"/etc/\xff"))
    guest.files.finish({})
    assert guest.tree()["job/d/l"] == b"/etc/\xff"
    assert guest.tree()["job/d/e/f"] == b"new"
    found = (guest.place / "d").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o500, 10**18)
    assert guest.files.failures == []


def test_link_is_replaced_not_followed(guest: Guest) -> None:
    (guest.place / "out").symlink_to("../secret")
    guest.file(b"out")
    assert not (guest.place / "out").is_symlink()
    assert (guest.place / "out").read_bytes() == b"new"


@pytest.mark.parametrize("path", [b"l/x", b"l/secret", b"l/y/z", b"l"])
@pytest.mark.parametrize("kind", ["file", "directory", "link", "follow"])
@pytest.mark.parametrize("own", [True, False])
def test_no_way_through_a_symbolic_link(guest: Guest, path: bytes, kind: str, own: bool) -> None:
    """Neither through one that the guest has sent, nor through one that was here."""
    if own:
        guest.begin(b"l", 9, "link", target=b64(b".."))
    else:
        (guest.place / "l").symlink_to("..")
    guest.begin(path, kind=kind, target=b64(b"t"))
    if kind in ("file", "follow"):
        guest.end()
    guest.files.finish({})
    if path != b"l" or kind == "directory":
        assert len(guest.files.failures) == 1
        assert "is no directory on this host" in guest.files.failures[0]
        assert guest.tree() == {"secret": b"untouched", "job/l": b".."}
    assert set(os.listdir(guest.top)) == {"secret", "job"}


def test_directory_in_the_way(guest: Guest) -> None:
    (guest.place / "full" / "x").mkdir(parents=True)
    (guest.place / "empty").mkdir()
    guest.file(b"full")
    guest.file(b"empty")
    assert [text.split(":")[0] for text in guest.files.failures] == ["full"]
    assert (guest.place / "empty").read_bytes() == b"new"
    assert sorted(os.listdir(guest.place)) == ["empty", "full"]


def test_close_drops_what_is_not_complete(tmp_path: Path) -> None:
    guest = Guest(tmp_path)
    before = guest.tree()
    guest.begin(b"half", size=100)
    guest.data(b"x" * 50)
    guest.files.close()
    assert guest.tree() == before


def test_without_nameless_files(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that has none."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_RDWR)
    guest.begin(b"half", 2, size=9)
    guest.file(b"whole")
    names = os.listdir(guest.place)
    assert "half" not in names
    assert len(names) == 2
    guest.files.close()
    assert os.listdir(guest.place) == ["whole"]
    guest.files = Returned(str(guest.place), guest.sent.append)


def test_failure_in_the_guest(guest: Guest) -> None:
    guest.begin(b"bad\x1b[2J", size=4)
    guest.data(b"x")
    guest.end(failed="Input/output error\x1b[2J")
    assert os.listdir(guest.place) == []
    assert guest.files.failures == ["bad?[2J: Input/output error?[2J"]


# -- followed files --------------------------------------------------------------------------------


def test_followed_file_grows(guest: Guest) -> None:
    (guest.place / "log").write_text("of an older run")
    guest.begin(b"log", kind="follow")
    guest.data(b"one ")
    assert (guest.place / "log").read_bytes() == b"one "
    guest.data(b"two", 4)
    guest.end(mode=0o4600, mtime=5 * 10**9)
    found = (guest.place / "log").stat()
    assert (found.st_size, found.st_mode & 0o7777, found.st_mtime) == (7, 0o600, 5)


def test_followed_file_goes_on(guest: Guest) -> None:
    (guest.place / "log").write_bytes(b"old ")
    guest.begin(b"log", kind="follow", size=4)
    guest.data(b"new", 4)
    guest.end()
    assert (guest.place / "log").read_bytes() == b"old new"


@pytest.mark.parametrize("make", ["changed", "fifo", "link"])
def test_followed_file_that_is_another_now(guest: Guest, make: str) -> None:
    path = guest.place / "log"
    if make == "changed":
        path.write_bytes(b"longer than 4")
    elif make == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("../secret")
    guest.begin(b"log", kind="follow", size=4)
    guest.data(b"new", 4)
    guest.end()
    assert len(guest.files.failures) == 1
    if make == "changed":
        assert path.read_bytes() == b"longer than 4"


# -- what breaks the protocol ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"kind": "device"}, {"kind": None}, {"kind": "link"}, {"kind": "link", "target": ""},
        {"kind": "link", "target": b64(b"a\0b")}, {"mode": -1}, {"mode": 0o10000}, {"mode": "1"},
        {"size": -1}, {"size": 1 << 63}, {"size": 1.5}, {"size": True}, {"mtime": 1 << 80},
        {"mtime": None}, {"id": -1}, {"id": 1 << 32}, {"path": None}, {"path": "?"},
    ],
)  # fmt: skip
def test_bad_heads(guest: Guest, more: dict[str, Any]) -> None:
    with pytest.raises(BROKEN):
        guest.begin(b"x", **{"number": 1, **more})
    assert os.listdir(guest.place) == []


def test_two_of_one_number(guest: Guest) -> None:
    guest.begin(b"a", size=1)
    with pytest.raises(frames.FrameError):
        guest.begin(b"b", size=1)


def test_too_many_at_once(guest: Guest) -> None:
    with pytest.raises(frames.FrameError):
        for number in range(1000):
            guest.begin(b"f%d" % number, number, size=1)
    assert len(guest.files._files) < 100


@pytest.mark.parametrize("pieces", [[(0, 11)], [(5, 6)], [(0, 5), (4, 1)], [((1 << 64) - 1, 1)]])
@pytest.mark.parametrize("kind", ["file", "follow"])
def test_bytes_out_of_place(guest: Guest, kind: str, pieces: list[tuple[int, int]]) -> None:
    if kind == "follow" and pieces[0][0] == 0 and len(pieces) == 1:
        return  # it may grow
    guest.begin(b"x", kind=kind, size=10 if kind == "file" else 0)
    with pytest.raises(frames.FrameError):
        for offset, count in pieces:
            guest.data(b"x" * count, offset)


def test_unknown_numbers(guest: Guest) -> None:
    with pytest.raises(BROKEN):
        guest.data(b"x")
    for number in (1, -1):
        with pytest.raises(BROKEN):
            guest.end(number)
    for kind, payload in (
        (frames.FILE_DATA, b"short"), (frames.FILE, b"[]"), (frames.FILE_END, b"[]"),
        (frames.FILE, b"[" * frames.MAX_PAYLOAD), (frames.FILE_END, b"\xff"),
    ):  # fmt: skip
        with pytest.raises(BROKEN):
            guest.files.frame(kind, payload)
    with pytest.raises(frames.FrameError):
        guest.files.frame(frames.DATA, b"x")


def test_end_before_all_is_complete(guest: Guest) -> None:
    guest.begin(b"x", size=1)
    with pytest.raises(frames.FrameError):
        guest.files.finish({})


@pytest.mark.parametrize(
    "report", [None, [], {"failed": 5}, {"failed": [1]}, {"unmatched": [5]}, {"left_out": -1}]
)
def test_bad_reports(guest: Guest, report: Any) -> None:
    with pytest.raises(BROKEN):
        guest.files.finish(report)


@given(st.lists(st.tuples(
    st.sampled_from([frames.FILE, frames.FILE_DATA, frames.FILE_END]),
    st.fixed_dictionaries({
        "id": st.integers(0, 2),
        "kind": st.sampled_from(["file", "directory", "link", "follow"]),
        "path": st.sampled_from([b"a", b"b", b"a/b", b"b/a", b"a/b/secret", b"a/secret"]).map(b64),
        "target": st.sampled_from([b"..", b"../secret", b"a", b"/"]).map(b64),
        "size": st.integers(0, 3),
    }),
)))  # fmt: skip
def test_no_sequence_of_frames_reaches_outside(
    tmp_path_factory: pytest.TempPathFactory, sent: list[tuple[int, dict[str, Any]]]
) -> None:
    guest = Guest(tmp_path_factory.mktemp("guest"))
    try:
        for kind, head in sent:
            payload = json.dumps(head).encode()
            if kind == frames.FILE_DATA:
                payload = frames.PIECE.pack(head["id"], head["size"]) + b"x"
            guest.files.frame(kind, payload)
        guest.files.finish({})
    except BROKEN:
        pass
    guest.files.close()
    assert set(os.listdir(guest.top)) == {"secret", "job"}
    assert (guest.top / "secret").read_text() == "untouched"
    assert not [name for name in guest.tree() if "apppot-" in name]


def test_credit_comes_in_large_pieces(guest: Guest) -> None:
    """A guest's serial line buffers 4096 bytes; what is under way in credit must be less."""
    guest.begin(b"x", size=10 << 20)
    piece = bytes(60 << 10)
    for number in range(160):
        guest.data(piece, number * len(piece))
    given_back = sum(frames.U32.unpack(frame[-4:])[0] for frame in guest.sent)
    assert 160 * len(piece) - given_back < frames.FILES_CREDIT // 8
    assert len(guest.sent) < 80
