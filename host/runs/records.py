"""Runs: finding a virtual machine that a launcher started, by the record that it keeps."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from apppot.host.common import locks
from apppot.host.common.errors import ApppotError, UsageError
from apppot.host.common.files import read_json, write_json
from apppot.host.common.frozen import frozen
from apppot.host.common.host import boot_id
from apppot.host.common.paths import state_home
from apppot.host.process.rundir import candidates

_POLL_SECONDS = 0.1
_KEPT = 100  # records of runs that have ended
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


class RunError(ApppotError):
    """A run is unknown, over, or out of reach."""


class RunState(StrEnum):
    """What a record says together with its launcher."""

    STARTING = "starting"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"  # its launcher is gone and left no status
    ELSEWHERE = "elsewhere"  # of another host, which alone knows


@frozen
class RunRecord:
    """What is known about a run.  Times are UTC."""

    id: str
    name: str
    image: str
    command: tuple[str, ...]
    created: str
    host: str
    boot: str  # of the host: a process number means nothing in another one
    pid: int  # of the launcher
    pid_started: int  # in clock ticks since the host's boot
    kept: bool  # stays after the run
    detached: bool = False
    run_directory: str = ""
    started: str = ""
    ended: str = ""
    status: int | None = None
    reason: str = ""  # why there is no status of the command itself
    pid_namespace: int = 0  # in which `pid` counts; 0: not known

    @property
    def folder(self) -> str:
        return os.path.join(home(), self.id) if self.kept else self.run_directory

    @property
    def socket(self) -> str:
        return os.path.join(self.run_directory, SOCKET)

    def log(self, stream: str) -> str:
        """The file with what a detached run wrote to `stdout` or `stderr`."""
        return os.path.join(self.folder, f"{stream}.log")


def check_name(name: str) -> None:
    """Raise UsageError for a name that cannot be a run's."""
    if not name or name[0] in ".-" or not set(name) <= _NAME_CHARACTERS or len(name) > 100:
        raise UsageError(f"{name!r} cannot name a run", "use letters, digits and - _ .")


def read(folder: str) -> RunRecord | None:
    """The record in `folder`; None where there is none that this version understands."""
    value = read_json(os.path.join(folder, RECORD), VERSION)
    if value is None:
        return None
    del value["version"]
    try:
        return RunRecord(**{**value, "command": tuple(value["command"])})
    except (TypeError, KeyError):
        return None


def is_live(record: RunRecord) -> bool:
    """Whether its launcher lives; of another host, whether that was not denied.

    The lock that it holds tells that in every PID namespace; its process is seen only in its own.
    """
    if record.host != os.uname().nodename:
        return record.status is None
    if record.status is not None:
        return False
    try:
        return locks.is_held(os.path.join(record.folder, LOCK))
    except OSError:  # of a launcher from before there was a lock
        return _is_visible(record)


def _is_visible(record: RunRecord) -> bool:
    """Whether its launcher is a process of this PID namespace, and lives."""
    if record.boot != boot_id() or record.pid_namespace not in (0, pid_namespace()):
        return False
    return process_start(record.pid) == record.pid_started


def state(record: RunRecord) -> RunState:
    """What is going on with it."""
    if record.status is not None:
        return RunState.ENDED
    if record.host != os.uname().nodename:
        return RunState.ELSEWHERE
    if not is_live(record):
        return RunState.LOST
    return RunState.RUNNING if record.started else RunState.STARTING


def list_runs() -> list[RunRecord]:
    """All runs that can be found, the oldest first."""
    found = {record.id: record for record in _passing_records() if is_live(record)}
    found.update({record.id: record for record in kept_records()})
    return sorted(found.values(), key=_age)


def _age(record: RunRecord) -> tuple[str, int]:
    return record.created, record.pid_started


def kept_records() -> list[RunRecord]:
    try:
        names = os.listdir(home())
    except OSError:
        return []
    found = [read(os.path.join(home(), name)) for name in names]
    return [record for record in found if record is not None and record.kept]


def _passing_records() -> Iterator[RunRecord]:
    """Records in the run directories of this host."""
    prefix = f"apppot-{os.getuid()}-"
    for place in dict.fromkeys(candidates(os.environ)):
        try:
            names = [name for name in os.listdir(place) if name.startswith(prefix)]
        except OSError:
            continue
        for name in names:
            path = os.path.join(place, name)
            if os.path.isdir(path) and os.stat(path).st_uid == os.getuid():
                record = read(path)
                # A run whose record stays has none there.
                if record is not None and not record.kept and record.run_directory == path:
                    yield record


def find(word: str) -> RunRecord:
    """The run of that name, or with an id that begins so.  Raises RunError.

    Of several with one name it is the newest, and one under way before all that have ended.
    """
    records = list_runs()
    found = [record for record in records if word in (record.name, record.id)]
    if not found and len(word) >= 4:
        found = [record for record in records if record.id.startswith(word)]
        if len({record.id for record in found}) > 1:
            raise RunError(f"several runs have an id that begins with {word}")
    if not found:
        raise RunError(f"there is no run {word}", "`apppot ps` lists the runs")
    return max(found, key=lambda record: (is_live(record), _age(record)))


def await_end(record: RunRecord, seconds: float | None = None) -> bool:
    """Wait until its launcher has ended; whether it has, within `seconds`."""
    import select

    pidfd = _process(record)
    if pidfd is None:
        return _await_release(record, seconds)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(None if seconds is None else int(seconds * 1000)))
    finally:
        os.close(pidfd)


def _await_release(record: RunRecord, seconds: float | None) -> bool:
    """As `await_end`, for a launcher whose process is not to be seen: by its lock."""
    import time

    end = None if seconds is None else time.monotonic() + seconds
    while is_live(record):
        if end is not None and time.monotonic() >= end:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def launcher(record: RunRecord) -> int | None:
    """A descriptor of the launcher's process; None when it does not live.

    Raises RunError for a run of another host or PID namespace.
    """
    pidfd = _process(record)
    if pidfd is None and is_live(record):
        raise RunError(f"run {record.name} is of another PID namespace", "go there")
    return pidfd


def _process(record: RunRecord) -> int | None:
    """A descriptor of the launcher's process; None when it is not here, or does not live."""
    if state(record) is RunState.ELSEWHERE:
        raise RunError(f"run {record.name} is on {record.host}", "go there")
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return None
    # Looked at once more: now the number cannot become another's.
    if is_live(record) and _is_visible(record):
        return pidfd
    os.close(pidfd)
    return None


def connect(record: RunRecord) -> socket.socket:
    """A connection to its launcher.  Raises RunError where there is none."""
    current = state(record)
    if current is not RunState.RUNNING:
        status = "" if record.status is None else f" with status {record.status}"
        where = f" on {record.host}" if current is RunState.ELSEWHERE else ""
        words = {RunState.STARTING: "has not started yet", RunState.LOST: "is lost"}
        words |= {RunState.ENDED: f"has ended{status}", RunState.ELSEWHERE: f"is{where}"}
        raise RunError(f"run {record.name} {words[current]}", "`apppot ps` lists the runs")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(record.socket)
    except OSError as error:
        connection.close()
        raise RunError(f"run {record.name} cannot be reached: {error.strerror}") from error
    return connection


def removable(words: list[str]) -> list[RunRecord]:
    """The runs meant by `words`, each once.  Raises RunError where one is not over."""
    found = {record.id: record for record in map(find, words)}
    for record in found.values():
        if state(record) is RunState.ELSEWHERE:
            raise RunError(f"run {record.name} is on {record.host}", "go there")
        if is_live(record):
            hint = f"`apppot stop {record.name}` ends it"
            raise RunError(f"run {record.name} is under way", hint)
    return list(found.values())


def remove(record: RunRecord) -> None:
    """Remove what is kept of a run: record and output.  Raises RunError."""
    try:
        # The record last: a removal that was interrupted can be asked for again.
        for name in sorted(os.listdir(record.folder), key=lambda name: name == RECORD):
            os.unlink(os.path.join(record.folder, name))
        os.rmdir(record.folder)
    except OSError as error:
        raise RunError(f"run {record.name} cannot be removed: {error}") from error


def prune(records: list[RunRecord]) -> None:
    """Remove the oldest records of runs that have ended."""
    over = sorted((r for r in records if not is_live(r)), key=_age)
    for record in over[:-_KEPT]:
        with contextlib.suppress(RunError):
            remove(record)


VERSION = 1
SOCKET = "control"
RECORD = "record.json"
LOCK = "lock"  # of the launcher, as long as it lives


def home() -> str:
    """Where the records lie that stay."""
    return os.path.join(state_home(), "runs")


def process_start(pid: int) -> int | None:
    """When the process started, in ticks since the host's boot; None when it does not live."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as text:
            fields = text.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def pid_namespace() -> int:
    """The number of this process's PID namespace; 0 where that cannot be known."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def write(folder: str, values: dict[str, Any], durable: bool) -> None:
    """Write a record, whole or not at all; a durable one survives a crash of the host."""
    write_json(os.path.join(folder, RECORD), values, 0o600, version=VERSION, durable=durable)
