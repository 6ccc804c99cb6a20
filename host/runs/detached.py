"""`apppot run --detach`: a launcher that outlives the command, its output in files.

Until the payload has started, what the launcher has to say goes to the caller's stderr and its
failure is the caller's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from types import FrameType

from apppot.host.common.errors import EXIT_FAILED, EXIT_SIGNAL_BASE, HypervisorError
from apppot.host.process import spawn
from apppot.host.runs.recorder import Recorder, status_of

_OPEN_MAX = 1 << 30
_TO_THE_LAUNCHER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start(run: Callable[[Recorder], int], make_recorder: Callable[..., Recorder]) -> int:
    """Start `run` in the background; prints the run's id once its payload has started."""
    ours, pipe = spawn.detach()
    if ours:
        return _launch(run, make_recorder, pipe)
    said: dict[str, str] = {}

    def forward(number: int, _: FrameType | None) -> None:
        said["signal"] = str(number)
        if "pid" in said:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(said["pid"]), number)

    for number in _TO_THE_LAUNCHER:
        signal.signal(number, forward)
    with os.fdopen(pipe, encoding="ascii") as lines:
        for line in iter(lines.readline, ""):
            word, _, value = line.strip().partition(" ")
            said[word] = value
            if word == "started":
                break
    return _outcome(said)


def _outcome(said: Mapping[str, str]) -> int:
    if "started" in said:
        print(said["started"])
        return 0
    if "status" in said:
        return int(said["status"])
    if "signal" in said:  # before it caught any
        return EXIT_SIGNAL_BASE + int(said["signal"])
    raise HypervisorError("the launcher in the background was killed before the command started")


def _launch(
    run: Callable[[Recorder], int], make_recorder: Callable[..., Recorder], pipe: int
) -> int:
    """In the background: the run, with what it says until its start to the caller."""
    caller = Waiting(pipe)
    status = EXIT_FAILED
    try:
        recorder: Recorder = make_recorder(
            detached=True, on_started=lambda: caller.leave(recorder.id)
        )
        recorder.claim()
        _redirect(recorder.folder)
        status = run(recorder)
    except BaseException as error:
        status = status_of(error)
        raise
    finally:
        caller.failed(status)
    return status


class Waiting:
    """Who waits for the start: the other end of a pipe, and its stderr."""

    def __init__(self, pipe: int) -> None:
        os.closerange(3, pipe)
        os.closerange(pipe + 1, _OPEN_MAX)
        self._pipe: int | None = pipe
        self._stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
        sys.stderr = self._stderr
        self._say(f"pid {os.getpid()}")

    def leave(self, number: str) -> None:
        """The run has started: nothing of the caller's is needed any more."""
        self._say(f"started {number}")
        sys.stderr = sys.__stderr__
        self._stderr.close()
        self._close()

    def failed(self, status: int) -> None:
        """The run is over; the caller returns its status if it still waits."""
        self._say(f"status {status}")

    def _close(self) -> None:
        if self._pipe is not None:
            os.close(self._pipe)
        self._pipe = None

    def _say(self, line: str) -> None:
        try:
            if self._pipe is not None:
                os.write(self._pipe, f"{line}\n".encode())
        except OSError:
            self._close()


def _redirect(folder: str) -> None:
    """stdin from nowhere, stdout and stderr to the record's logs."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    ends = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)]
    ends += [os.open(f"{folder}/{stream}.log", flags, 0o600) for stream in ("stdout", "stderr")]
    for number, fd in enumerate(ends):
        os.dup2(fd, number)
        os.close(fd)
