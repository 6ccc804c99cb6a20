"""The record of one run, as its launcher keeps it.

Each run has a record in its run directory, beside the control socket; it goes with them.  A run
with a name, or in the background, has one in $XDG_STATE_HOME/apppot/runs/ID that stays, with the
exit status; there its output is kept too.  Others read both through `apppot.host.runs`.

On the launcher's way to the payload: imports nothing that the launcher does not have.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

from apppot.host.common import locks
from apppot.host.common.errors import EXIT_FAILED, EXIT_SIGNAL_BASE, ApppotError
from apppot.host.common.host import boot_id
from apppot.host.common.units import timestamp
from apppot.host.runs.records import LOCK, SOCKET, home, pid_namespace, process_start, write


class Recorder:
    """Keeps one run's record.  `on_started` is called when the payload has started."""

    def __init__(
        self,
        image: str,
        command: list[str],
        name: str | None,
        detached: bool = False,
        on_started: Callable[[], object] = bool,
    ) -> None:
        pid = os.getpid()
        self.id = os.urandom(6).hex()
        self._on_started = on_started
        self._kept = name is not None or detached
        # Tells that we live, until we end; a record that passes has the run directory's lock.
        self._lock: int | None = None
        # The fields of `runs.Record`.
        self._values: dict[str, Any] = {
            "id": self.id,
            "name": self.id if name is None else name,
            "image": image,
            "command": command,
            "created": timestamp(),
            "host": os.uname().nodename,
            "boot": boot_id(),
            "pid": pid,
            "pid_started": process_start(pid) or 0,
            "pid_namespace": pid_namespace(),
            "kept": self._kept,
            "detached": detached,
        }

    @property
    def folder(self) -> str:
        """Where the record lies: in the run directory once there is one, or where it stays."""
        return os.path.join(home(), self.id) if self._kept else self._values["run_directory"]

    def claim(self) -> None:
        """Take the name.  Raises RunError when a run that is under way has it."""
        if not self._kept:
            return
        from apppot.host.runs import records as runs

        name = self._values["name"]
        runs.check_name(name)
        os.makedirs(home(), mode=0o700, exist_ok=True)
        with locks.held(os.path.join(home(), "lock")):
            records = runs.kept_records()
            for other in records:
                if other.name == name and runs.is_live(other):
                    raise runs.RunError(
                        f"the name {name} is taken by run {other.id}",
                        f"use another name, or `apppot stop {name}`",
                    )
            os.mkdir(self.folder, 0o700)
            # Before the record: who reads that asks for the lock.
            self._lock = locks.acquire(os.path.join(self.folder, LOCK))
            self._update()
            runs.prune(records)

    @contextlib.contextmanager
    def open(self, run_directory: str) -> Iterator[socket.socket]:
        """The control socket in the run directory, while it is there."""
        self._update(run_directory=run_directory)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(os.path.join(run_directory, SOCKET))
            listener.listen(64)
            listener.setblocking(False)
            yield listener

    def started(self) -> None:
        """The payload's first instruction is next."""
        self._update(started=timestamp())
        self._on_started()

    def ended(self, status: int, reason: str = "") -> None:
        """The run is over; `status` is what its launcher returns."""
        if self._kept:
            self._update(ended=timestamp(), status=status, reason=reason)
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _update(self, **values: Any) -> None:
        self._values.update(values)
        try:
            write(self.folder, self._values, self._kept)
        except OSError as error:
            if not self._kept:
                return  # a full run directory must not end a job
            raise ApppotError(f"the run cannot be recorded: {error}") from error


def status_of(error: BaseException) -> int:
    """The exit status of a launcher that `error` ends."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_SIGNAL_BASE + 2
    return int(getattr(error, "exit_code", EXIT_FAILED))
