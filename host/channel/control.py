"""Messages on a run's control socket: what a client asks of a launcher, and what it hears.

Each is one datagram of JSON.  What comes from the other side is checked where it is loaded.
"""

from __future__ import annotations

import json
import os
from binascii import a2b_base64, b2a_base64
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from apppot.host.common.frozen import frozen

if TYPE_CHECKING:
    from apppot.guest.protocol.job import Job

MESSAGE_BYTES = 4096  # of one message
_TEXT_CHARACTERS = 300  # each takes 12 bytes at most
_LAST_SIGNAL = 64
_IDS = 1 << 32  # of users, and of groups
_LONGEST_GRACE = 1e9  # seconds; no duration on a command line is longer


@frozen
class Execute:
    """Start a process; its stdin, stdout, stderr and the file with its ExecRequest come along."""


@frozen
class Signal:
    """A signal for the client's process."""

    number: int


@frozen
class Resize:
    """The size of the client's terminal."""

    rows: int
    columns: int


@frozen
class Stop:
    """End the payload: SIGTERM now, SIGKILL after `grace` seconds."""

    grace: float


@frozen
class Started:
    """The client's process runs."""


@frozen
class Stopped:
    """It has been stopped, as by Ctrl-Z."""


@frozen
class Exited:
    """It has ended, with the exit status that the client is to return."""

    status: int
    complaint: str = ""


@frozen
class Refused:
    """It did not start, or nothing more is known of it."""

    reason: str


Order = Execute | Signal | Resize | Stop
Answer = Started | Stopped | Exited | Refused


def dump(message: Order | Answer) -> bytes:
    """The datagram of a message; a long text in it is cut."""
    value: dict[str, Any]
    match message:
        case Execute():
            value = {"exec": 1}
        case Signal(number):
            value = {"signal": int(number)}
        case Resize(rows, columns):
            value = {"resize": [rows, columns]}
        case Stop(grace):
            value = {"stop": grace}
        case Started():
            value = {"started": True}
        case Stopped():
            value = {"stopped": True}
        case Exited(status, complaint):
            value = {"exit": status, "complaint": complaint[:_TEXT_CHARACTERS]}
        case Refused(reason):
            value = {"error": reason[:_TEXT_CHARACTERS]}
    return json.dumps(value).encode()


def load_order(data: bytes) -> Order:
    """What a client asks.  Raises ValueError."""
    match _parsed(data):
        case {"exec": _}:
            return Execute()
        case {"signal": int(number)} if 0 < number <= _LAST_SIGNAL:
            return Signal(number)
        case {"resize": [int(rows), int(columns)]} if _is_size(rows, columns):
            return Resize(rows, columns)
        # Compared before it is made a float, which an integer may be too large for.
        case {"stop": float() | int() as grace} if grace < _LONGEST_GRACE:
            return Stop(float(max(0, grace)))
    raise ValueError("no order")


def load_answer(data: bytes) -> Answer:
    """What a launcher says.  Raises ValueError."""
    match _parsed(data):
        case {"started": _}:
            return Started()
        case {"stopped": _}:
            return Stopped()
        case {"exit": int(status), "complaint": str(complaint)}:
            return Exited(status, complaint)
        case {"error": str(reason)}:
            return Refused(reason)
    raise ValueError("no answer")


@frozen
class ExecRequest:
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
    def load(cls, data: bytes) -> ExecRequest:
        """The request that `dump` wrote.  Raises ValueError, TypeError or KeyError.

        What the guest's agent cannot act on would end the guest, and the payload with it.
        """
        value = _parsed(data)
        value["argv"] = tuple(a2b_base64(word) for word in value["argv"])
        value["env"] = {a2b_base64(name): a2b_base64(word) for name, word in value["env"]}
        value["cwd"] = None if value["cwd"] is None else a2b_base64(value["cwd"])
        request = cls(**value)
        request._check()
        return request

    def _check(self) -> None:
        """Raise ValueError where fields hold what is none."""
        if not all(isinstance(flag, bool) for flag in (self.tty, self.read_stdin)):
            raise ValueError("a flag that is neither true nor false")
        if not _is_size(self.rows, self.columns):
            raise ValueError("no size of a terminal")
        if not (self.user is None or isinstance(self.user, str)):
            raise ValueError("no name of a user")
        for word in (self.user or "").split(":"):
            if word.isdecimal() and int(word) >= _IDS:
                raise ValueError(f"no account has the number {word}")

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


def _parsed(data: bytes) -> Any:
    """The JSON of a message.  Raises ValueError."""
    try:
        return json.loads(data)
    except RecursionError as error:  # JSON's answer to deep nesting
        raise ValueError("nested too deeply") from error


def _is_size(rows: Any, columns: Any) -> bool:
    """Whether a terminal can have that size, and a RESIZE frame hold it."""
    return all(isinstance(count, int) and 0 <= count < 1 << 16 for count in (rows, columns))


def _text(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode("ascii")
