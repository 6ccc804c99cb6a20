"""The cycle: a session, its changes as one file, the same environment from base and changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.layers import QUIET, WORK, listing, tool
from tests.harness.vm import IMAGE, RELEASE, Launcher, Who


@pytest.fixture
def session(apppot: Launcher, request: pytest.FixtureRequest) -> str:
    """A session in which WORK was done; deleted afterwards."""
    name = f"test-{apppot.run_home.name}"
    request.addfinalizer(lambda: tool(apppot, "session", "rm", name))
    result = apppot("--session", name, *QUIET, "-u", "root", IMAGE, "sh", "-c", WORK)
    assert result.ok().decode().startswith(RELEASE)
    return name


def test_base_and_changes_equal_the_session(apppot: Launcher, session: str) -> None:
    before = listing(apppot, "--session", session)
    saved = tool(apppot, "changes", "save", session, "-o", "it.changes")
    assert saved.status == 0, saved
    assert listing(apppot, "--changes", "it.changes") == before
    assert listing(apppot, "--session", session) == before, "saving changed the session"


def test_the_file_says_exactly_what_changed(apppot: Launcher, session: str) -> None:
    assert tool(apppot, "changes", "save", session, "-o", "it.changes").status == 0
    text = tool(apppot, "changes", "diff", "--json", "it.changes").ok()
    found = {entry["path"]: entry for entry in map(json.loads, text.splitlines())}
    kinds = {path: entry["type"] for path, entry in found.items()}
    assert kinds["etc/issue"] == kinds["usr/share/doc/bash"] == "deleted"
    assert kinds["usr/share/doc/sed"] == "replaced directory"
    assert kinds["usr/share/doc/dash"] == "file"
    assert found["home/user/mine"]["uid"] == 1000
    assert found["etc/new.conf"]["mtime_ns"] == 981173106123456789
    assert found["etc/new.conf"]["links"] == 2
    assert found["etc/new.conf"]["xattrs"]["user.colour"] == b"blue".hex()
    assert {"security.capability", "system.posix_acl_access"} <= set(found["opt/cap"]["xattrs"])
    assert found["opt/dev"]["device"] == [7, 9]
    assert found["opt/sparse"]["size"] == (10 << 20) + 3
    assert "opt/a\nb\udcff" in found
    # What the agent generates is in none of it.
    for name in ("etc/resolv.conf", "etc/hostname", "etc/hosts", "etc/sudoers.d/apppot"):
        assert name not in found


def test_another_user_of_another_site(apppot: Launcher, user: Launcher, session: str) -> None:
    """Files of `user` are the caller's own, whatever his uid; the rest is the same."""
    if user.who == apppot.who:
        pytest.skip("needs a second account: run the tests as root")
    assert tool(apppot, "changes", "save", session, "-o", "it.changes").status == 0
    there = user.work / "it.changes"
    there.write_bytes((apppot.work / "it.changes").read_bytes())
    there.chmod(0o644)
    script = "uname -r; stat -c %U:%u /home/user/mine /opt/cap; cat /home/user/mine; ls /etc/issue"
    result = user("--changes", "it.changes", *QUIET, IMAGE, "sh", "-c", script)
    lines = result.out.decode().splitlines()
    assert lines[0].startswith(RELEASE)
    assert lines[1:] == [f"user:{user.who.uid}", "root:0", "mine"]
    assert result.status == 2  # ls: /etc/issue was deleted


def test_changes_belong_to_their_base(apppot: Launcher, session: str) -> None:
    assert tool(apppot, "changes", "save", session, "-o", "it.changes").status == 0
    words = ("--changes", "it.changes", *QUIET, "hmmer", "true")
    apppot(*words).failed("belong to the image", IMAGE, "remedy")


def test_several_are_joined_into_one(apppot: Launcher, session: str) -> None:
    assert tool(apppot, "changes", "save", session, "-o", "one.changes").status == 0
    second = f"{session}-2"
    script = (
        "uname -r; rm /opt/fifo; rm -r /usr/share/doc/bash2; mkdir /usr/share/doc/bash2;"
        "echo 2 > /usr/share/doc/bash2/two; rm /usr/share/doc/dash; mkdir /usr/share/doc/dash;"
        "echo back > /etc/issue"
    )
    options = ("--session", second, "--changes", "one.changes", *QUIET, "-u", "root")
    try:
        assert apppot(*options, IMAGE, "sh", "-c", script).ok().decode().startswith(RELEASE)
        assert tool(apppot, "changes", "save", second, "-o", "two.changes").status == 0
    finally:
        tool(apppot, "session", "rm", second)
    joined = tool(apppot, "changes", "squash", "one.changes", "two.changes", "-o", "all.changes")
    assert joined.status == 0, joined
    stacked = listing(apppot, "--changes", "one.changes", "--changes", "two.changes")
    assert listing(apppot, "--changes", "all.changes") == stacked


def test_a_session_has_one_user_at_a_time(apppot: Launcher, session: str) -> None:
    running = apppot.start(
        "--session", session, *QUIET, IMAGE, "sh", "-c", "uname -r; exec sleep 60"
    )
    assert running.line().decode().startswith(RELEASE)
    again = apppot("--session", session, *QUIET, IMAGE, "true")
    again.failed("in use by process", str(running.pid))


def test_a_session_survives_kill_9(apppot: Launcher, session: str) -> None:
    script = "uname -r; echo kept > /opt/kept; sync; echo synced; exec sleep 60"
    running = apppot.start("--session", session, *QUIET, "-u", "root", IMAGE, "sh", "-c", script)
    assert running.line().decode().startswith(RELEASE)
    assert running.line() == b"synced\n"
    running.kill()
    result = apppot("--session", session, *QUIET, IMAGE, "cat", "/opt/kept")
    assert result.ok() == b"kept\n"


def test_damaged_changes_are_refused(apppot: Launcher, session: str) -> None:
    assert tool(apppot, "changes", "save", session, "-o", "it.changes").status == 0
    whole = (apppot.work / "it.changes").read_bytes()
    Path(apppot.work / "short.changes").write_bytes(whole[: len(whole) // 2])
    apppot("--changes", "short.changes", *QUIET, IMAGE, "true").failed("truncated")
    marked = bytearray(whole)
    marked[-40] ^= 0xFF
    Path(apppot.work / "record.changes").write_bytes(marked)
    apppot("--changes", "record.changes", *QUIET, IMAGE, "true").failed("damaged")


def test_a_scratch_disk_holds_more_than_memory(apppot: Launcher) -> None:
    script = "uname -r; head -c 300000000 /dev/zero > /big; stat -c %s /big; df -m / | tail -1"
    options = ("--mem", "128M", "--scratch", "2G", *QUIET, "-u", "root")
    lines = apppot(*options, IMAGE, "sh", "-c", script).ok().decode().splitlines()
    assert lines[0].startswith(RELEASE)
    assert lines[1] == "300000000"
    assert 1800 < int(lines[2].split()[1]) < 2100


def test_ordinary(user: Launcher) -> None:
    """An ordinary user's session, saved and run again."""
    name = f"own-{user.run_home.name}"
    who: Who = user.who
    script = "uname -r; echo x > /home/user/x; sudo -n touch /opt/roots"
    result = user("--session", name, *QUIET, IMAGE, "sh", "-c", script)
    assert result.ok().decode().startswith(RELEASE)
    again = user("--session", name, *QUIET, IMAGE, "stat", "-c", "%u", "/home/user/x", "/opt/roots")
    assert again.ok().decode().split() == [str(who.uid), "0"]
