"""The job directory and other shared directories: contents, names, owners, modes."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher

ODD_NAMES = (
    b"with space", b"comma,comma", b"colon:colon", b"quote'\"", b"new\nline", b"\xff\xfe",
    b"back\\slash", b"$HOME;`id`", b"-dash", "ünï☃".encode(), b"x" * 200, b"a=b%s",
)  # fmt: skip


def test_is_the_current_directory(apppot: Launcher) -> None:
    (apppot.work / "in").write_bytes(b"\x00from the host\xff")
    out = apppot.sh("pwd; uname -r | tee out; cat in").ok()
    where, release, data = out.split(b"\n", 2)
    assert (where, data) == (b"/home/user/job", b"\x00from the host\xff")
    assert (apppot.work / "out").read_bytes() == release + b"\n"


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_odd_directory_names(apppot: Launcher, name: bytes) -> None:
    directory = os.fsencode(apppot.work) + b"/" + name
    os.mkdir(directory)
    assert apppot(IMAGE, "sh", "-c", "uname -r > out", cwd=directory).ok() == b""
    with open(directory + b"/out") as file:
        assert file.read().startswith(RELEASE)


@pytest.mark.parametrize("name", ODD_NAMES, ids=repr)
def test_odd_file_names(apppot: Launcher, name: bytes) -> None:
    (apppot.work / "in").mkdir()
    with open(os.fsencode(apppot.work) + b"/in/" + name, "wb") as file:
        file.write(b"content")
    script = 'mkdir out; for f in in/*; do mv "$f" out/; done; uname -r'
    assert apppot.sh(script).ok().decode().startswith(RELEASE)
    assert os.listdir(os.fsencode(apppot.work) + b"/out") == [name]


def test_none(apppot: Launcher) -> None:
    (apppot.work / "in").touch()
    out = apppot("--job-dir", "none", IMAGE, "sh", "-c", "pwd; ls; uname -r").ok().decode()
    assert not (apppot.work / "out").exists()
    assert "in\n" not in out
    assert out.splitlines()[-1].startswith(RELEASE)


def test_another(apppot: Launcher, place: Path) -> None:
    other = place / "other"
    other.mkdir()
    apppot("--job-dir", str(other), IMAGE, "sh", "-c", "uname -r > out").ok()
    assert (other / "out").read_text().startswith(RELEASE)
    assert list(apppot.work.iterdir()) == []


def test_bind_directory(apppot: Launcher, place: Path) -> None:
    shared = place / "shared"
    shared.mkdir()
    (shared / "in").write_text("input")
    script = "cat /data/set/in; uname -r > /data/set/out"
    assert apppot("-v", f"{shared}:/data/set", IMAGE, "sh", "-c", script).ok() == b"input"
    assert (shared / "out").read_text().startswith(RELEASE)


def test_bind_read_only(apppot: Launcher, place: Path) -> None:
    shared = place / "shared"
    shared.mkdir()
    (shared / "in").write_text("input")
    script = "cat /data/in; echo x > /data/out || uname -r; rm -f /data/in; chmod 777 /data/in"
    result = apppot("--bind", f"{shared}:/data:ro", IMAGE, "sh", "-c", script)
    assert result.out.decode().startswith(f"input{RELEASE}")
    assert os.listdir(shared) == ["in"]
    assert b"Read-only file system" in result.err


@pytest.mark.parametrize("confine", ["bubblewrap", "landlock", "off"])
def test_bind_file(apppot: Launcher, place: Path, confine: str) -> None:
    (place / "config file").write_text("of the host")
    (place / "link").symlink_to("config file")
    words = ["--confine", confine, "--bind", f"{place / 'link'}:/etc/some/config"]
    script = "cat /etc/some/config; uname -r > /etc/some/config; ls /etc/some"
    assert apppot(*words, IMAGE, "sh", "-c", script).ok() == b"of the hostconfig\n"
    assert (place / "config file").read_text().startswith(RELEASE)


def test_bind_file_read_only(apppot: Launcher, place: Path) -> None:
    (place / "file").write_text("of the host")
    words = ["--bind", f"{place / 'file'}:/etc/file:ro"]
    result = apppot(*words, IMAGE, "sh", "-c", "cat /etc/file; echo x > /etc/file || uname -r")
    assert result.out.decode().startswith(f"of the host{RELEASE}")
    assert (place / "file").read_text() == "of the host"


@pytest.mark.parametrize("name", [b"comma,x", b"sp ace", b"quote'\"", b"new\nline", b"\xff"])
def test_bind_of_odd_names(apppot: Launcher, place: Path, name: bytes) -> None:
    shared = os.fsencode(place) + b"/" + name
    os.mkdir(shared)
    out = apppot("-v", shared + b":/data", IMAGE, "sh", "-c", "uname -r > /data/out").ok()
    assert out == b""
    with open(shared + b"/out") as file:
        assert file.read().startswith(RELEASE)


def test_work_directory(apppot: Launcher) -> None:
    (apppot.work / "sub dir").mkdir()
    assert apppot("-w", "/usr", IMAGE, "pwd").ok() == b"/usr\n"
    assert apppot("-w", "sub dir", IMAGE, "pwd").ok() == b"/home/user/job/sub dir\n"


def test_work_directory_that_is_missing(apppot: Launcher) -> None:
    result = apppot("-w", "/no/such", IMAGE, "true")
    assert result.status == 125
    assert b"/no/such" in result.err


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002, 0o000])
def test_umask(apppot: Launcher, mask: int) -> None:
    out = apppot(IMAGE, "sh", "-c", "umask; > file; mkdir directory; uname -r", umask=mask).ok()
    shown, release = out.decode().split()
    assert int(shown, 8) == mask
    assert release.startswith(RELEASE)
    assert stat.S_IMODE((apppot.work / "file").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((apppot.work / "directory").stat().st_mode) == 0o777 & ~mask


def test_owner_is_the_ordinary_user(user: Launcher) -> None:
    """Seen as the caller's on both sides, without an account on the host."""
    (user.work / "in").write_text("x")
    (user.work / "in").chmod(0o644)
    uid, gid = user.who.uid, user.who.gid
    script = "id -u; id -g; id -un; stat -c '%u %g' .; mkdir d; > d/file; uname -r"
    lines = user.sh(script).ok().decode().splitlines()
    assert lines[:4] == [str(uid), str(gid), "user", f"{uid} {gid}"]
    assert lines[4].startswith(RELEASE)
    made = (user.work / "d" / "file").stat()
    assert (made.st_uid, made.st_gid) == (uid, gid)


def test_guest_root_is_no_root_on_the_host(user: Launcher) -> None:
    (user.work / "of-root").write_text("x")
    (user.work / "of-root").chmod(0o600)
    if os.getuid() == 0:
        os.chown(user.work / "of-root", 0, 0)
    out = user("-u", "root", IMAGE, "sh", "-c", "id -u; cat of-root 2>/dev/null; uname -r").ok()
    lines = out.decode().splitlines()
    assert lines[0] == "0"
    assert lines[1].startswith(RELEASE)


def test_links_sparse_and_special_files(apppot: Launcher) -> None:
    script = r"""
        ln -s target link && echo t > target && cat link && ln target hard && stat -c %h target
        truncate -s 1G sparse && stat -c %b sparse; mkfifo fifo; (echo through > fifo &) ; cat fifo
        mv target renamed; exec 5> gone; rm gone; echo open >&5; flock renamed uname -r
    """
    lines = apppot.sh(script).ok().decode().splitlines()
    assert lines[:4] == ["t", "2", "0", "through"]
    assert lines[4].startswith(RELEASE)
    assert os.readlink(apppot.work / "link") == "target"
    assert (apppot.work / "hard").samefile(apppot.work / "renamed")
    assert (apppot.work / "sparse").stat().st_size == 1 << 30


def test_no_set_uid_in_the_job_directory(user: Launcher) -> None:
    script = (
        "cp /usr/bin/id . && sudo -n chown root ./id; sudo -n chmod 4755 ./id; ./id -u; uname -r"
    )
    result = user.sh(script)
    lines = result.out.decode().splitlines()
    assert lines[0] == str(user.who.uid)
    assert lines[1].startswith(RELEASE)
