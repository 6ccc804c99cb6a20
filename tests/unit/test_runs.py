"""Records of runs: what they say, whatever became of their launcher."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from apppot.guest.protocol.job import Job
from apppot.host import cli
from apppot.host.channel.control import ExecRequest
from apppot.host.common.errors import ApppotError, UsageError
from apppot.host.common.host import boot_id
from apppot.host.runs import records
from apppot.host.runs.recorder import Recorder, status_of
from apppot.host.runs.records import RunError, RunRecord, RunState, home, process_start
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("XDG_STATE_HOME", "XDG_RUNTIME_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(records, "candidates", lambda env: [str(tmp_path)])
    return tmp_path


def book(name: str | None = "vm", **options: Any) -> Recorder:
    made = Recorder("debian-12", ["sh", "-c", "exit"], name, **options)
    made.claim()
    return made


def killed(one: Recorder) -> None:
    """What becomes of its lock when its launcher is killed."""
    assert one._lock is not None
    os.close(one._lock)
    one._lock = None


def record(name: str = "vm") -> RunRecord:
    return records.find(name)


def rewrite(old: RunRecord, **values: Any) -> None:
    """What another launcher, host or boot would have written."""
    new = {"version": 1, **asdict(replace(old, **values))}
    Path(old.folder, "record.json").write_text(json.dumps(new))


def test_from_start_to_end(place: Path) -> None:
    one = book()
    assert records.state(record()) is RunState.STARTING
    with one.open(str(place)):
        assert Path(record().socket).is_socket()
        one.started()
        assert records.state(record()) is RunState.RUNNING
    one.ended(7, "because")
    ended = record()
    assert (records.state(ended), ended.status, ended.reason) == (RunState.ENDED, 7, "because")
    assert ended.created <= ended.started <= ended.ended
    assert records.await_end(ended)


def test_started_is_told_after_it_is_written(place: Path) -> None:
    seen: list[RunState] = []
    one = book(on_started=lambda: seen.append(records.state(record())))
    one.started()
    assert seen == [RunState.RUNNING]


@pytest.mark.parametrize(
    "values",
    [
        {"pid": 1 << 30},  # gone
        {"pid_started": 1},  # its number is another's now
        {"boot": "another"},  # the host was started anew
    ],
)
def test_without_launcher_it_is_lost(values: dict[str, Any]) -> None:
    one = book()
    one.started()
    rewrite(record(), **values)
    assert records.state(record()) is RunState.RUNNING, "its lock is held, whatever is seen here"
    killed(one)
    rewrite(record(), pid=os.getpid())
    check_lost()


@pytest.mark.parametrize(
    "values",
    [
        {"pid": 1 << 30},  # gone
        {"pid_started": 1},  # its number is another's now
        {"boot": "another"},  # the host was started anew
        {"pid_namespace": 1},  # its number counts elsewhere
    ],
)
def test_without_a_lock_its_process_tells(values: dict[str, Any]) -> None:
    """Of a launcher from before there was one."""
    one = book()
    one.started()
    Path(record().folder, "lock").unlink()
    assert records.state(record()) is RunState.RUNNING
    rewrite(record(), **values)
    check_lost()


def check_lost() -> None:
    assert records.state(record()) is RunState.LOST
    assert record().status is None
    assert records.await_end(record())
    with pytest.raises(RunError, match="is lost"):
        records.connect(record())
    rewrite(record(), status=0)
    assert records.state(record()) is RunState.ENDED


def test_of_another_host() -> None:
    book().started()
    rewrite(record(), host="another", pid=1 << 30)
    assert records.state(record()) is RunState.ELSEWHERE
    for call in (records.connect, records.await_end):
        with pytest.raises(RunError, match="another"):
            call(record())


def test_of_another_pid_namespace() -> None:
    one = book()
    one.started()
    pid = os.getppid()
    rewrite(record(), pid=pid, pid_started=process_start(pid), pid_namespace=1)
    assert records.state(record()) is RunState.RUNNING
    assert not records.await_end(record(), 0.2)
    with pytest.raises(RunError, match="another PID namespace"):
        records.launcher(record())
    one.ended(0)
    assert records.await_end(record())


def test_names_are_taken_while_a_run_lives() -> None:
    first = book()
    with pytest.raises(RunError, match="the name vm is taken"):
        book()
    first.ended(0)
    second = book()
    assert record().id == second.id
    second.ended(1)
    assert len(records.list_runs()) == 2


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "é", "x" * 101])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError):
        book(name)


def test_found_by_id() -> None:
    one = book(None, detached=True)
    assert records.find(one.id).id == records.find(one.id[:4]).id == one.id
    for word in (one.id[:3], "nothing", ""):
        with pytest.raises(RunError, match="there is no run"):
            records.find(word)


def test_a_run_that_is_nobodys_leaves_nothing(place: Path) -> None:
    directory = place / f"apppot-{os.getuid()}-abc"
    directory.mkdir()
    one = book(None)
    with one.open(str(directory)):
        one.started()
        (found,) = records.list_runs()
        assert (found.id, found.kept, records.state(found)) == (one.id, False, RunState.RUNNING)
    one.ended(3)
    rewrite(found, pid=1 << 30)
    assert records.list_runs() == []
    assert not (place / "apppot").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 2}', '{"version": 1, "x": 1}'])
def test_damaged_records_are_passed_over(text: str) -> None:
    book("good")
    bad = Path(home(), "bad")
    bad.mkdir()
    (bad / "record.json").write_text(text)
    assert [one.name for one in records.list_runs()] == ["good"]


def test_old_records_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_KEPT", 3)
    for number in range(6):
        one = book(f"run{number}")
        rewrite(record(f"run{number}"), created=f"2026-01-01T00:00:0{number}Z")
        one._values["created"] = f"2026-01-01T00:00:0{number}Z"
        one.ended(0)
    book("last")
    assert [one.name for one in records.list_runs()] == ["run3", "run4", "run5", "last"]


def test_processes() -> None:
    start = process_start(os.getpid())
    assert start is not None
    since_boot = psutil.Process().create_time() - psutil.boot_time()
    assert abs(start / os.sysconf("SC_CLK_TCK") - since_boot) < 1.5  # boot_time: whole seconds
    assert process_start(1 << 30) is None
    assert str(uuid.UUID(boot_id())) == boot_id()


def test_status_of_errors() -> None:
    assert status_of(ApppotError("x")) == 125
    assert status_of(KeyboardInterrupt()) == 130
    assert status_of(ValueError()) == 125


_BYTES = st.binary(max_size=20)


@given(st.lists(_BYTES), st.dictionaries(_BYTES, _BYTES), st.one_of(st.none(), _BYTES))
def test_requests_carry_any_bytes(
    argv: list[bytes], env: dict[bytes, bytes], cwd: bytes | None
) -> None:
    request = ExecRequest(tuple(argv), env, cwd, "root", True, False, 10, 20)
    assert ExecRequest.load(request.dump()) == request


def test_a_request_is_the_payloads_job_but_for_what_it_says() -> None:
    payload = Job(argv=[b"main"], env={b"A": b"1", b"B": b"2"}, cwd=b"/x", umask=0o27, uid=7)
    payload.job_dir, payload.closed = b"job", [0]
    job = ExecRequest((b"ls",), {b"B": b"3"}).job(payload)
    assert (job.argv, job.env, job.cwd) == ([b"ls"], {b"A": b"1", b"B": b"3"}, b"/x")
    assert (job.umask, job.uid, job.user, job.closed) == (0o27, 7, "user", [])
    other = ExecRequest((), {}, cwd=b"sub", user="root", tty=True).job(payload)
    assert (other.cwd, other.user, other.tty) == (b"/home/user/job/sub", "root", True)
    assert other.env[b"TERM"] == b"linux"


def test_records_are_removed() -> None:
    done, lost, under_way = book("done", detached=True), book("lost"), book("under-way")
    Path(record("done").log("stdout")).write_text("words")
    done.ended(3)
    lost.started()
    killed(lost)
    with pytest.raises(RunError, match="under way"):
        cli.dispatch(["rm", "done", "under-way"])
    with pytest.raises(RunError, match="no run nothing"):
        cli.dispatch(["rm", "done", "nothing"])
    assert {one.name for one in records.list_runs()} == {"done", "lost", "under-way"}
    assert cli.dispatch(["rm", "done", done.id, "lost"]) == 0
    assert [one.name for one in records.list_runs()] == ["under-way"]
    assert os.listdir(home()).count(done.id) == 0
    under_way.ended(0)


def test_of_several_runs_of_a_name_the_newest_goes() -> None:
    for status in (1, 2):
        book("vm").ended(status)
        rewrite(record("vm"), created=f"2020-01-0{status}T00:00:00Z")
    cli.dispatch(["rm", "vm"])
    assert record("vm").status == 1
    cli.dispatch(["rm", "vm"])
    with pytest.raises(RunError, match="no run vm"):
        record("vm")


def test_another_hosts_run_is_left_alone() -> None:
    book("far").ended(0)
    rewrite(record("far"), host="elsewhere", status=None)
    with pytest.raises(RunError, match="go there"):
        cli.dispatch(["rm", "far"])
    rewrite(record("far"), status=0)
    assert cli.dispatch(["rm", "far"]) == 0
