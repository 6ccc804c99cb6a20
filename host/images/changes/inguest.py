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
from apppot.host.process import run as process

_PROGRAM = (
    "import sys; sys.path.insert(0, '/usr/lib/apppot');"
    "from apppot.guest.merge.changes import main; sys.exit(main(sys.argv[1:]))"
)
_HOURS = 12 * 3600.0


def run(
    words: Sequence[str],
    options: Sequence[str],
    image: str,
    folder: str | None,
    cwd: str | None = None,
    stdout: int = process.PIPE,
) -> None:
    """Have the guest's layer program do `words` on `image`; it prints into `stdout`.

    `options` are further ones of `apppot run`, relative to `cwd`; `folder` is where it writes.
    Raises ImageError with what it said when it failed.
    """
    argv = [*process.LAUNCHER, "run", "--in-pot", "-n", "-T", "--network", "none"]
    argv += ["-u", "root", "--job-dir", folder or "none", *options, image]
    argv += ["/usr/bin/python3.11", "-IS", "-c", _PROGRAM, *words]
    place = Path(cwd) if cwd else None
    done = process.run(argv, check=False, timeout=_HOURS, cwd=place, stdout=stdout)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()
        raise ImageError(said.removeprefix("apppot: ") or f"{words[0]} failed in the guest")


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
