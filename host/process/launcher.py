"""A command of ours in a guest: this launcher, run as a process of its own.

Builds and exports need a kernel for a moment; a user's Ctrl-C, limits and output stay theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from apppot.host.common.errors import EXIT_FAILED, ApppotError
from apppot.host.common.frozen import frozen
from apppot.host.process.run import NOTHING, PIPE, ToolError, run, run_lines

# The first words of a command line of this launcher, whatever it is called by.
LAUNCHER = (sys.executable, "-c", "from apppot.host.cli import main; main()")
_HOURS = 12 * 3600.0
_SAID_BY_US = "apppot: "
_REMEDY = "\n  remedy: "


@frozen
class GuestCommand:
    """What root is to do in a guest of its own.  Texts are as `apppot run` takes them."""

    image: str
    command: tuple[str, ...]
    memory: str | None = None
    scratch: str | None = None
    hypervisor: str | None = None
    network: bool = False
    job_dir: str | None = None
    binds: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    session: str | None = None
    env: tuple[str, ...] = ()
    workdir: str | None = None
    timeline: str | None = None  # a file that tells where the time went
    stdin: bool = False  # what `stream` is given; else it is /dev/null
    neutral: bool = False  # nothing of the caller shows
    in_pot: bool = False  # the command is the pot's own program
    bare: bool = False  # without the image's entrypoint

    def argv(self) -> list[str]:
        """The launcher's command line for it."""
        flags = {"--neutral": self.neutral, "--in-pot": self.in_pot, "-n": not self.stdin}
        words = [*LAUNCHER, "run", "-T", *(flag for flag, wanted in flags.items() if wanted)]
        words += ["-u", "root", "--network", "user" if self.network else "none"]
        words += ["--job-dir", self.job_dir or "none"]
        for option, value in (
            ("--mem", self.memory),
            ("--scratch", self.scratch),
            ("--hypervisor", self.hypervisor),
            ("--session", self.session),
            ("-w", self.workdir),
            ("--timeline", self.timeline),
            ("--entrypoint", "" if self.bare else None),
        ):
            words += [] if value is None else [option, value]
        for option, values in (("-v", self.binds), ("--changes", self.changes), ("-e", self.env)):
            words += [word for value in values for word in (option, value)]
        return [*words, self.image, *self.command]


class GuestCommandError(ApppotError):
    """It failed: `status` is its own, or the launcher's 125; `cause` is what was said last."""

    def __init__(self, cause: str, hint: str, status: int) -> None:
        super().__init__(cause, hint)
        self.status = status


def complete(command: GuestCommand, *, cwd: Path | None = None, stdout: int = PIPE) -> bytes:
    """Run it to its end; what it wrote, where that did not go to the descriptor `stdout`.

    Raises GuestCommandError.
    """
    done = run(command.argv(), check=False, timeout=_HOURS, cwd=cwd, stdout=stdout)
    if done.returncode != 0:
        raise _failure(done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout


def stream(
    command: GuestCommand,
    on_line: Callable[[str], None],
    *,
    data: int,
    stdin: int = NOTHING,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run it, its stdout into the descriptor `data`, each line of its stderr to `on_line`.

    Raises GuestCommandError with the last of these lines.
    """
    try:
        run_lines(command.argv(), on_line, env=env, data=data, stdin=stdin)
    except ToolError as error:
        if error.status is None:
            raise
        raise _failure(error.status, error.said) from None


def _failure(status: int, said: str) -> GuestCommandError:
    """What the launcher says of itself, where it is what failed; else what the command said."""
    said = said.strip()
    if status == EXIT_FAILED:
        said = said[max(0, f"\n{said}".rfind(f"\n{_SAID_BY_US}")) :]
    cause, _, hint = said.removeprefix(_SAID_BY_US).partition(_REMEDY)
    return GuestCommandError(cause or f"it ended with status {status}", hint, status)
