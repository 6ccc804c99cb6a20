"""The host's one process wrapper for tools that run to completion.

The virtual machine and its helpers are started by `apppot.host.process.spawn`; everything else goes
through `run` here.  A test bans other uses of `subprocess`.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from apppot.host.common.errors import ApppotError
from apppot.host.common.frozen import frozen

PIPE, NOTHING = subprocess.PIPE, subprocess.DEVNULL
_TAIL = 8  # lines of a tool that failed


@frozen
class Completed:
    """What a finished tool left: its exit status (negative for a signal) and its output."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes


class ToolError(ApppotError):
    """A tool is missing, failed or took too long.

    Of one that ran to its end, `status` is what it returned, and `said` what it wrote last.
    """

    def __init__(
        self, cause: str, hint: str = "", status: int | None = None, said: str = ""
    ) -> None:
        super().__init__(cause, hint)
        self.status, self.said = status, said


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the tool and all that it started; they share a process group of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _failure(argv: Sequence[str], returncode: int, stderr: bytes, hint: str) -> ToolError:
    tail = stderr.decode(errors="replace").strip().splitlines()[-_TAIL:]
    how = f"was killed by signal {-returncode}" if returncode < 0 else f"returned {returncode}"
    cause = "\n    ".join([f"{' '.join(argv[:4])} … {how}", *tail])
    return ToolError(cause, hint, returncode, "\n".join(tail))


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    check: bool = True,
    timeout: float | None = 600.0,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | int = subprocess.DEVNULL,
    stdout: int = PIPE,
    hint: str = "",
) -> Completed:
    """Run one tool to its end and return what it left.

    `env` replaces the environment when given.  `stdin` is bytes to feed or a descriptor.
    `timeout` is in seconds; on expiry the whole process group is killed and collected.
    Raises ToolError when the tool is missing, times out or (with `check`) fails.
    """
    words = tuple(os.fspath(word) for word in argv)
    feed = stdin if isinstance(stdin, bytes) else None
    try:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=env,
            stdin=stdin if isinstance(stdin, int) else subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ToolError(f"{words[0]} is not installed", hint) from error
    except OSError as error:
        raise ToolError(f"{words[0]} cannot be started: {error.strerror}", hint) from error
    try:
        out, err = process.communicate(feed, timeout)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        process.communicate()
        raise ToolError(f"{words[0]} did not end within {timeout:.0f} s", hint) from None
    except BaseException:
        _kill_group(process)
        process.communicate()
        raise
    if check and process.returncode:
        raise _failure(words, process.returncode, err, hint)
    return Completed(words, process.returncode, out or b"", err or b"")


def run_lines(
    argv: Sequence[str | os.PathLike[str]],
    on_line: Callable[[str], None],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int = subprocess.DEVNULL,
    data: int | None = None,
    hint: str = "",
) -> None:
    """Run a long tool, hand each line that it prints (stdout and stderr) to `on_line`.

    With the descriptor `data`, stdout goes there and only stderr is lines.  Raises ToolError
    with the last lines when it fails.
    """
    words = tuple(os.fspath(word) for word in argv)
    last: list[str] = []
    try:
        process = subprocess.Popen(
            words,
            cwd=cwd,
            env=env,
            stdin=stdin,
            stdout=subprocess.PIPE if data is None else data,
            stderr=subprocess.STDOUT if data is None else subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ToolError(f"{words[0]} is not installed", hint) from error
    lines = process.stdout if data is None else process.stderr
    assert lines is not None
    try:
        with lines:
            for raw in lines:
                line = raw.decode(errors="replace").rstrip("\n")
                last = [*last[-15:], line]
                on_line(line)
        process.wait()
    except BaseException:
        _kill_group(process)
        process.wait()
        raise
    if process.returncode:
        raise _failure(words, process.returncode, "\n".join(last).encode(), hint)
