"""A host that differs from this one: Debian 13, in whose root a launcher of this tree runs.

The kernel is this host's; QEMU, virtiofsd, bubblewrap and Python are Debian 13's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from apppot.host.common import paths

from tests.harness.vm import ROOT, Launcher, Who
from tests.scenarios.images import alone, built

RECIPE = ROOT / "image-recipes" / "lab" / "debian-13-host.toml"
# What is his has this id, as what a user has in images.
ORDINARY = 1000
_PROGRAM = "from apppot.host.cli import main; main()"


def root() -> Path:
    """Debian 13's root, unpacked; built where there is none.  Raises ApppotError."""
    image = Path(built(str(RECIPE)))
    folder = Path(paths.cache_home()) / "tests" / f"debian-13-host-{image.name[:16]}"
    with alone():
        if not folder.is_dir():
            temporary = folder.with_suffix(".new")
            shutil.rmtree(temporary, ignore_errors=True)
            words = ["unsquashfs", "-quiet", "-no-progress", "-d", str(temporary), str(image)]
            subprocess.run(words, check=True, capture_output=True)
            temporary.chmod(0o755)
            temporary.rename(folder)
    return folder


def command(place: Path, missing: tuple[str, ...]) -> tuple[str, ...]:
    """The words in front of a launcher's own; it and the test share /tmp and /dev/shm.

    `missing` are programs that the host does not have.
    """
    words = ["bwrap", "--die-with-parent"]
    words += ["--ro-bind", str(place), "/", "--dev-bind", "/dev", "/dev"]
    for path in ("/proc", "/sys", "/tmp"):
        words += ["--bind", path, path]
    words += ["--perms", "0755", "--tmpfs", "/srv", "--perms", "0755", "--dir", "/srv/apppot"]
    shown = {"apppot/host": ROOT / "host", "apppot/guest": ROOT / "guest"}
    shown |= {"pot": Path(paths.pot_home()), "store": Path(paths.data_home())}
    for name, source in shown.items():
        words += ["--ro-bind", str(source), f"/srv/{name}"]
    for path in missing:
        words += ["--ro-bind", "/dev/null", path]
    if os.getuid() == 0:
        words += ["--cap-add", "ALL", "setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}"]
        words += ["--clear-groups", "--pdeathsig=KILL"]
    return (*words, "/usr/bin/python3", "-c", _PROGRAM)


def environment(home: Path) -> Mapping[str, str]:
    return {
        "PATH": "/usr/sbin:/usr/bin:/bin",
        "PYTHONPATH": "/srv",
        "PYTHONDONTWRITEBYTECODE": "1",
        "APPPOT_POT": "/srv/pot",
        "APPPOT_SITE_STORE": "/srv/store",
        "APPPOT_HYPERVISOR": "qemu",
        "LC_ALL": "C.UTF-8",
        "HOME": str(home),
        "XDG_DATA_HOME": str(home / "data"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TMPDIR": "/tmp",
    }


def launcher(directory: Path, place: Path, *missing: str) -> Launcher:
    """A launcher on that host, of an ordinary user where the tests are root's."""
    home = directory / "home"
    home.mkdir()
    who = Who(os.getuid(), os.getgid(), command(place, missing), environment(home))
    made = Launcher(directory, who)
    if os.getuid() == 0:
        for path in (home, made.work, made.state, made.run_home):
            os.chown(path, ORDINARY, ORDINARY)
    return made
