"""Many machines one after another leave nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from apppot.host.common import paths
from apppot.host.images import store
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import workspace

from tests.harness.vm import IMAGE, RELEASE, Launcher

RUNS = 200

# Memory of their own at /dev/shm and /tmp, where other tests' files come and go; in the latter
# the test's directory ($1) stays.
PRIVATE = (
    'set -e; mount --bind "$1" /mnt; mount -t tmpfs shm /dev/shm; mount -t tmpfs tmp /tmp;'
    'mkdir -p "$1"; mount --bind /mnt "$1"; umount /mnt; echo ready; exec sleep infinity'
)


@pytest.fixture
def apart(place: Path) -> Iterator[int]:
    """A process in a mount namespace whose /dev/shm and /tmp are its own."""
    argv = ["unshare", "--mount", "sh", "-c", PRIVATE, "sh", str(place)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield holder.pid
        holder.kill()


def own_store(place: Path, patch: pytest.MonkeyPatch) -> Path:
    """A store with one image in it, which nobody else uses."""
    found, data = resolve(IMAGE), place / "data"
    assert found.record is not None
    patch.setenv("APPPOT_POT", paths.pot_home())
    patch.setenv("APPPOT_SITE_STORE", str(place / "none"))
    patch.setenv("XDG_DATA_HOME", str(data))
    with workspace() as folder:
        copy = os.path.join(folder, "image")
        shutil.copyfile(found.path, copy)
        store.add(copy, found.record, found.digest)
    return data


def listing(folder: Path) -> list[str]:
    """Everything below `folder`."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def room(folder: Path) -> int:
    """Bytes that the files below `folder` take."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


@pytest.mark.skipif(os.getuid() != 0, reason="a /tmp of its own needs root")
@pytest.mark.timeout(900)
def test_many_runs_leave_no_growth(
    apppot: Launcher, place: Path, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cache = own_store(place, monkeypatch), place / "cache"
    env = {"XDG_CACHE_HOME": str(cache), "XDG_RUNTIME_DIR": "", "TMPDIR": ""}
    inside = ("nsenter", "--target", str(apart), "--mount", f"--wd={apppot.work}")
    seen = {"shm": Path(f"/proc/{apart}/root/dev/shm"), "tmp": Path(f"/proc/{apart}/root/tmp")}
    seen |= {"store": data, "cache": cache, "state": apppot.state, "job": apppot.work}

    def once() -> None:
        out = apppot(IMAGE, "uname", "-r", wrap=inside, env=env).ok()
        assert out.decode().startswith(RELEASE)

    once()  # what is probed once and remembered
    before = {name: (listing(folder), room(folder)) for name, folder in seen.items()}
    for _ in range(RUNS):
        once()
    assert {name: (listing(folder), room(folder)) for name, folder in seen.items()} == before
    assert apppot.left() == []
