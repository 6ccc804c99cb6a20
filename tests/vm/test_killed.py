"""kill -9 while changes are saved or committed: nothing half-made, and the next try works."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.harness.layers import QUIET, apart, busybox_tree, tool
from tests.harness.vm import RELEASE, Launcher, Running, Who, eventually, kernels, myself

pytestmark = pytest.mark.timeout(300)
Moment = Callable[[Launcher, Path], bool]


@pytest.fixture
def apppot(launcher_for: Callable[[Who], Launcher], place: Path) -> Launcher:
    """A user with a small base image, and a session over it that takes a moment to pack."""
    launcher = launcher_for(apart(myself(), place / "data"))
    busybox_tree(launcher.work / "tree", ("sh", "uname", "head", "cat", "sha256sum"))
    (launcher.work / "tree" / "srv").mkdir()
    words = [
        "mksquashfs",
        str(launcher.work / "tree"),
        str(launcher.work / "small.squashfs"),
        "-quiet",
    ]
    subprocess.run(words, check=True)
    assert tool(launcher, "image", "import", "small.squashfs").status == 0
    script = "uname -r; for n in 1 2 3; do head -c 9000000 /dev/urandom >/srv/$n; done"
    done = launcher("--session", "s", *QUIET, "-u", "root", "small", "sh", "-c", script)
    assert done.ok().decode().startswith(RELEASE)
    return launcher


def data(apppot: Launcher) -> Path:
    return Path(apppot.who.env["XDG_DATA_HOME"]) / "apppot"


def guest_runs(apppot: Launcher, work: Path) -> bool:
    return bool(kernels(apppot.marker))


def file_is_there(apppot: Launcher, work: Path) -> bool:
    return any(path.stat().st_size for path in _made(apppot, work))


def file_is_large(apppot: Launcher, work: Path) -> bool:
    return any(path.stat().st_size > 10_000_000 for path in _made(apppot, work))


def _made(apppot: Launcher, work: Path) -> list[Path]:
    found = [*work.glob(".it.changes.*"), *data(apppot).glob("images/tmp/*/image")]
    return [path for path in found if path.exists()]


MOMENTS = (guest_runs, file_is_there, file_is_large)


def kill(apppot: Launcher, moment: Moment, words: Sequence[str]) -> None:
    """Start `apppot WORDS`, and end it and all that it started in that moment."""
    command, *rest = words
    running: Running = apppot.start(*rest, command=command)
    came = eventually(lambda: moment(apppot, apppot.work) or running.process.poll() is not None)
    assert came and running.process.poll() is None, "it had ended before the moment came"
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    apppot.await_nothing_left(20)


def names(apppot: Launcher) -> list[str]:
    listed = json.loads(tool(apppot, "image", "list", "--json").ok())
    mine = [image for image in listed if image["store"].startswith(str(data(apppot)))]
    return sorted(image["name"] for image in mine)


def test_save(apppot: Launcher) -> None:
    for moment in MOMENTS:
        kill(apppot, moment, ["changes", "save", "s", "-o", "it.changes"])
        assert not (apppot.work / "it.changes").exists()
    assert tool(apppot, "changes", "save", "s", "-o", "it.changes").status == 0
    assert tool(apppot, "changes", "verify", "it.changes").status == 0
    whole = (apppot.work / "it.changes").read_bytes()
    # What was there before stays until the new one is whole.
    kill(apppot, file_is_there, ["changes", "save", "s", "-o", "it.changes"])
    assert (apppot.work / "it.changes").read_bytes() == whole
    script = "uname -r; cat /srv/1 /srv/2 /srv/3 | sha256sum"
    shown = [
        apppot(*options, *QUIET, "small", "sh", "-c", script).ok()
        for options in (("--session", "s"), ("--changes", "it.changes"))
    ]
    assert shown[0] == shown[1] and shown[0].decode().startswith(RELEASE)
    assert tool(apppot, "changes", "save", "s", "-o", "it.changes").status == 0
    assert [path.name for path in apppot.work.glob(".it*")] == []


def test_commit(apppot: Launcher) -> None:
    for moment in MOMENTS:
        kill(apppot, moment, ["image", "commit", "--session", "s", "next"])
        assert names(apppot) == ["small"]
    assert tool(apppot, "image", "commit", "--session", "s", "next").status == 0
    assert names(apppot) == ["next", "small"]
    assert tool(apppot, "image", "verify", "next").status == 0
    assert tool(apppot, "image", "prune").status == 0
    assert list(data(apppot).glob("images/tmp/*")) == []
