"""Where the job comes from, by kernel command lines as they are seen in the guest."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from apppot.guest.payload import sources
from apppot.guest.payload.sources import CommandLine, split_words
from apppot.guest.protocol.drive import pack
from apppot.guest.protocol.job import Job, JobError
from hypothesis import given
from hypothesis import strategies as st


def find_job(line: CommandLine) -> Job:
    """The job of a guest that has one."""
    job = sources.find_job(line)
    assert job is not None
    return job


BOOT = b"root=/dev/ubda ro init=/sbin/apppot-init "


def test_the_kernels_own_console_is_no_argument() -> None:
    line = CommandLine(BOOT + b"-- prog a console=tty0\n")
    assert line.command == [b"prog", b"a"]
    assert line.consoles == ["tty0"]


def test_one_console_is_the_kernels_and_not_two() -> None:
    assert CommandLine(b"x -- a console=tty0 console=tty0").command == [b"a", b"console=tty0"]
    assert CommandLine(b"console=ttyS0 -- a console=tty0").command == [b"a", b"console=tty0"]
    assert CommandLine(b"x -- console=tty0").command == []


def test_consoles_are_in_the_kernels_order() -> None:
    line = CommandLine(b"console=tty0 quiet console=ttyS0,115200n8")
    assert line.consoles == ["tty0", "ttyS0"]
    assert line.command == []


def test_no_command_without_two_dashes() -> None:
    line = CommandLine(BOOT + b"apppot.uid=5 console=tty0")
    assert line.command == []
    assert line.words["apppot.uid"] == b"5"
    assert line.words["ro"] == b""


def test_the_originals_quotes_are_read() -> None:
    line = CommandLine(BOOT + b"--  'sh' '-c' 'echo  $1' 'a \"b\"' 'c' console=tty0")
    assert line.command == [b"sh", b"-c", b"echo  $1", b'a "b"', b"c"]


def test_quotes_that_do_not_close_are_words() -> None:
    assert split_words(b"it's  so") == [b"it's", b"so"]


@given(st.lists(st.binary(min_size=1).filter(lambda word: b"\0" not in word)))
def test_what_a_shell_would_quote_comes_back(words: list[bytes]) -> None:
    quoted = b" ".join(b"'" + word.replace(b"'", b"'\\''") + b"'" for word in words)
    assert split_words(quoted) == words


def test_the_originals_words_make_a_job() -> None:
    job = find_job(
        CommandLine(
            BOOT + b"TERM=vt100 apppot.uid=77 apppot.gid=78 apppot.jobdir=/a/b apppot.tmpdir=/c "
            b"apppot.changes=/d/e.sqfs apppot.user=me apppot.group=us -- run me console=tty0"
        )
    )
    assert (job.uid, job.gid, job.user, job.argv) == (77, 78, "me", [b"run", b"me"])
    assert job.job_dir == b"/a/b"
    assert [(mount.source, mount.target) for mount in job.mounts] == [(b"/c", b"/tmp")]
    assert [(layer.source, layer.fstype) for layer in job.layers] == [(b"/d/e.sqfs", "file")]
    assert job.env == {b"TERM": b"vt100"}


def test_changes_may_be_a_disk() -> None:
    (layer,) = find_job(CommandLine(b"apppot.changes=/dev/ubdb")).layers
    assert (layer.source, layer.fstype) == (b"/dev/ubdb", "squashfs")


def test_without_a_command_the_scripts_run() -> None:
    job = find_job(CommandLine(b"apppot.uid=1"))
    assert job.argv == []
    assert job.run_scripts


@pytest.mark.parametrize("word", [b"apppot.uid=x", b"apppot.gid="])
def test_ids_are_numbers(word: bytes) -> None:
    with pytest.raises(JobError, match="numbers"):
        find_job(CommandLine(word))


def test_a_job_in_the_command_line() -> None:
    job = Job(argv=[b"\xff\xfe~?", b""], env={b"A": b"b"})
    word = base64.urlsafe_b64encode(job.dump()).rstrip(b"=")
    assert find_job(CommandLine(BOOT + b"apppot.job=" + word)) == job
    with pytest.raises(JobError):
        find_job(CommandLine(b"apppot.job=AAAA"))


def test_a_drive_is_found_among_other_disks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(4096))
    (tmp_path / "b").write_bytes(pack(Job(argv=[b"x"]).dump()))
    devices = [str(tmp_path / name) for name in ("missing", "a", "b")]
    monkeypatch.setattr(sources, "block_devices", lambda: devices)
    assert find_job(CommandLine(BOOT)).argv == [b"x"]
    # A command in the command line comes first.
    assert find_job(CommandLine(BOOT + b"-- y")).argv == [b"y"]


def test_a_named_drive_must_be_one(tmp_path: Path) -> None:
    path = tmp_path / "drive"
    path.write_bytes(bytes(1024))
    with pytest.raises(ValueError, match="not a config drive"):
        find_job(CommandLine(b"apppot.drive=" + bytes(path)))
