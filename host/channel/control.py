"""Messages on a run's control socket."""

from __future__ import annotations

import json
import os
from binascii import a2b_base64, b2a_base64
from dataclasses import asdict
from typing import TYPE_CHECKING

from apppot.host.common.frozen import frozen

if TYPE_CHECKING:
    from apppot.guest.protocol.job import Job


@frozen
class Request:
    """What a client asks to be started in a running guest; None: as the payload has it."""

    argv: tuple[bytes, ...]
    env: dict[bytes, bytes]
    cwd: bytes | None = None
    user: str | None = None
    tty: bool = False
    read_stdin: bool = True
    rows: int = 24
    columns: int = 80

    def dump(self) -> bytes:
        """As JSON; what may hold any bytes is base64."""
        value = asdict(self)
        value["argv"] = [_text(word) for word in self.argv]
        value["env"] = [[_text(name), _text(word)] for name, word in self.env.items()]
        value["cwd"] = None if self.cwd is None else _text(self.cwd)
        return json.dumps(value).encode()

    @classmethod
    def load(cls, data: bytes) -> Request:
        """The request that `dump` wrote.  Raises ValueError, TypeError or KeyError."""
        value = json.loads(data)
        value["argv"] = tuple(a2b_base64(word) for word in value["argv"])
        value["env"] = {a2b_base64(name): a2b_base64(word) for name, word in value["env"]}
        value["cwd"] = None if value["cwd"] is None else a2b_base64(value["cwd"])
        return cls(**value)

    def job(self, payload: Job) -> Job:
        """The description of a process beside `payload`, without what only a boot needs."""
        from apppot.guest.protocol.job import HOME, JOB_DIR, Job

        job = Job.load(payload.dump())
        job.layers, job.mounts, job.network, job.localtime = [], [], None, None
        job.argv, job.env = list(self.argv), {**job.env, **self.env}
        job.tty, job.rows, job.columns, job.closed = self.tty, self.rows, self.columns, []
        if self.tty:
            job.env.setdefault(b"TERM", b"linux")
        if self.cwd is not None:
            start = JOB_DIR if job.has_job_dir() else HOME
            job.cwd = os.path.join(start.encode(), self.cwd)
        job.user = self.user or job.user
        return job


def _text(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode("ascii")


MESSAGE_BYTES = 4096  # of one message on a control socket
