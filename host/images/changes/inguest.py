"""Work on layers that needs a kernel: done in a guest, by the pot's own program.

The launcher runs itself; the guest mounts the layers and writes its result into a job directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from apppot.host.common import unfinished
from apppot.host.common.errors import ImageError, UsageError
from apppot.host.common.files import sync
from apppot.host.common.frozen import frozen
from apppot.host.process.launcher import GuestCommand, GuestCommandError, complete
from apppot.host.process.run import PIPE

_PROGRAM = (
    "import sys; sys.path.insert(0, '/usr/lib/apppot');"
    "from apppot.guest.merge.changes import main; sys.exit(main(sys.argv[1:]))"
)
# In the runtime a link to its interpreter, of whichever version the recipe has.
_PYTHON = "/usr/bin/python3"


@frozen
class Layers:
    """What the program finds mounted; texts are as `apppot run` takes them."""

    image: str
    changes: tuple[str, ...] = ()
    session: str | None = None
    binds: tuple[str, ...] = ()
    scratch: str | None = None


def run(
    words: Sequence[str],
    layers: Layers,
    folder: str | None,
    cwd: str | None = None,
    stdout: int = PIPE,
    timeline: str | None = None,
) -> None:
    """Have the guest's layer program do `words` on `layers`; it prints into `stdout`.

    Paths are relative to `cwd`; `folder` is where it writes.  Raises ImageError with what it
    said when it failed.
    """
    command = GuestCommand(
        layers.image,
        (_PYTHON, "-IS", "-c", _PROGRAM, *words),
        job_dir=folder,
        in_pot=True,
        binds=layers.binds,
        changes=layers.changes,
        session=layers.session,
        scratch=layers.scratch,
        timeline=timeline,
    )
    try:
        complete(command, cwd=Path(cwd) if cwd else None, stdout=stdout)
    except GuestCommandError as error:
        raise ImageError(error.cause, error.hint) from None


@contextmanager
def result(output: str) -> Iterator[str]:
    """A path beside `output` to write to; it takes that name when all went well.

    What others that wrote `output`, and were killed, have left goes.
    """
    folder, name = os.path.split(os.path.abspath(output))
    if os.path.isdir(output) or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{output!r} cannot be written", "name a file in a directory of yours: -o")
    unfinished.sweep(folder, name)
    with unfinished.making(folder, name) as work:
        yield work
        sync(work)
        os.rename(work, output)
