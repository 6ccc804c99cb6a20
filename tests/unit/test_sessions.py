"""Sessions on the host: what a kill leaves, what is damaged, what names an automatic one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from apppot.host import cli
from apppot.host.common import unfinished
from apppot.host.common.errors import UsageError
from apppot.host.common.files import file_digest
from apppot.host.images import sessions
from apppot.host.images.digests import known_digest
from apppot.host.original import session as automatic


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "APPPOT_SITE_STORE"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path / "apppot" / "sessions"


def test_what_killed_processes_left_is_swept(place: Path) -> None:
    place.mkdir(parents=True)
    with unfinished.making(str(place), "making") as live:
        for name in (live, place / f".making.{'0' * 16}", place / f".gone.{'1' * 16}"):
            Path(name).mkdir()
            Path(name, "disk.ext4").write_text("x")
            Path(f"{name}.lock").touch()
        assert sessions.list_sessions() == []
        sessions.create("dev", "i", "b")
        own = os.path.basename(live)
        assert sorted(os.listdir(place)) == sorted(["dev", own, f"{own}.lock"])
    assert os.listdir(place) == ["dev"]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1}', "\xff"])
def test_a_damaged_session_can_be_listed_and_deleted(
    place: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    sessions.create("whole", "i", "b")
    sessions.create("dev", "i\x1b[2J", "b")
    (place / "dev" / "session.json").write_text(text)
    with pytest.raises(sessions.SessionError, match="damaged"):
        sessions.get("dev")
    assert cli.dispatch(["session", "list"]) == 0
    assert "(damaged)" in capsys.readouterr().out
    assert cli.dispatch(["session", "rm", "dev"]) == 0
    assert [session.name for session in sessions.list_sessions()] == ["whole"]


def test_a_disk_that_is_gone_is_damage(place: Path) -> None:
    sessions.create("dev", "i", "b")
    (place / "dev" / "disk.ext4").unlink()
    with pytest.raises(sessions.SessionError, match="its disk is gone"):
        sessions.get("dev")
    assert cli.dispatch(["session", "list", "--json"]) == 0


def test_no_place_for_a_session_is_an_error(place: Path) -> None:
    place.parent.mkdir()
    place.write_text("a file where the directory should be")
    with pytest.raises(sessions.SessionError, match="no session can be made"):
        sessions.create("dev", "i", "b")
    assert not automatic.can_keep()


def test_sizes_have_bounds() -> None:
    session = sessions.create("dev", "i", "b", size=64 << 20)
    with pytest.raises(UsageError):
        sessions.resize(session, 63 << 20)
    assert cli.dispatch(["session", "resize", "dev", "2G"]) == 0
    assert sessions.get("dev").size() == 2 << 30
    with pytest.raises(UsageError):
        sessions.create("small", "i", "b", size=1 << 20)


def test_a_known_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for content, age in ((b"one", 100), (b"two", 100), (b"one", 0)):
        path.write_bytes(content)
        os.utime(path, (1e9 - age, 1e9 - age))
        assert known_digest(str(path)) == file_digest(str(path))
        assert known_digest(str(path)) == file_digest(str(path))
