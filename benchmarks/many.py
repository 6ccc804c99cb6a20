"""Many machines one after another from one image: how long each takes, and what they leave."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from apppot.host.common import paths
from apppot.host.images.resolve import resolve

from benchmarks.machines import IMAGE, Bench, apppot_run
from benchmarks.measure import Row, launch, row
from benchmarks.repository import Account

GROUP = "many"
# Places that all programs of the host use: only what is named like a run directory counts.
SHARED = ("/tmp", "/dev/shm")


def measure(given: Bench) -> list[Row]:
    """Rows about 200 machines in a row (20 with --quick): seconds of each, and growth."""
    folder = given.folder / "many"
    account, job = Account(folder / "home"), folder / "job"
    job.mkdir(parents=True)
    account.apppot("image", "import", resolve(IMAGE).path, "--name", IMAGE)
    env = {**account.env, "APPPOT_POT": paths.pot_home(), "TMPDIR": str(folder)}
    env["XDG_STATE_HOME"] = str(account.home / "state")
    argv = apppot_run(IMAGE, "true")
    launch(argv, cwd=job, env=env)  # what is probed once and remembered
    files, size = left(folder)
    number = given.rounds(20, 200)
    times = [launch(argv, cwd=job, env=env).seconds for _ in range(number)]
    more, larger = left(folder)
    title = f"after {number} machines"
    return [
        row(GROUP, "each of them, whole", times, "s"),
        row(GROUP, f"files more in store, cache, state, /tmp, /dev/shm {title}",
            [more - files], "", budget=0),
        row(GROUP, f"room that they take more {title}", [(larger - size) / 1e3], "KB", budget=0),
    ]  # fmt: skip


def left(folder: Path) -> tuple[int, int]:
    """How many files there are that machines of ours could have left, and their bytes."""
    sizes = [path.lstat().st_blocks * 512 for path in _found(folder)]
    return len(sizes), sum(sizes)


def _found(folder: Path) -> Iterator[Path]:
    yield from folder.rglob("*")
    for place in SHARED:
        for path in Path(place).glob(f"apppot-{os.getuid()}-*"):
            yield path
            yield from path.rglob("*")
