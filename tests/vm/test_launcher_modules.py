"""What the launcher loads on its way: each module costs every run a tenth of a millisecond."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.harness.vm import IMAGE, TIMEOUT

# Notes what is loaded when the hypervisor's process is started, and when all is over.
PROGRAM = """
import atexit, sys
def note(when):
    sys.stderr.write(f"{when}: {' '.join(sorted(sys.modules))}\\n")
def started(event, _):
    if event == "os.fork" and "apppot.host.machine.launch" in sys.modules and not noted:
        noted.append(event)
        note("start")
noted = []
sys.addaudithook(started)
atexit.register(note, "end")
from apppot.host.cli import main
main()
"""

# Of our own, by room: all that a run on User-Mode Linux loads, a plain one from an image.
ROOMS = {
    "": "cli",
    "capabilities": "capabilities memory",
    "channel": "console outcome process relay signals streams",
    "commands": "options parser run table",
    "common": "errors files frozen host locks paths terminal units",
    "config": "allocation caller settings",
    "confinement": "bubblewrap sandbox",
    "hypervisor": "base choice launchplan qemu uml verdicts xen",
    "images": "probe record resolve store workspace",
    "machine": "diagnosis disks failure fileserver helpers launch run sandbox",
    "network": "filter guard slirp",
    "plan": "confinement inherited jobfiles planner request",
    "pot": "layout",
    "process": "cpus rundir spawn",
    "runs": "kernels prepare recorder records start wish",
}
# Of Python's own, what such a run has no use for, and what would cost it most.
BANNED = {
    *("asyncio", "concurrent", "email", "hashlib", "html", "http", "logging", "multiprocessing"),
    *("pathlib", "random", "ssl", "subprocess", "tarfile", "tempfile", "threading", "tomllib"),
    *("traceback", "unittest", "urllib", "uuid", "xml", "zipfile"),
    *("cryptography", "psutil", "qemu", "requests", "sh", "shtab", "zstandard", "pyfastcdc"),
}


def test_modules_of_a_run(tmp_path: Path) -> None:
    words = ["run", "-n", "--hypervisor", "uml", "--confine", "bubblewrap", IMAGE, "true"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    loaded = {
        when: set(names.split())
        for when, names in re.findall(r"^(start|end): (.*)$", done.stderr.decode(), re.MULTILINE)
    }
    allowed = {f"apppot.host.{room}.{name}".replace("..", ".") for room, names in ROOMS.items()
               for name in names.split()}  # fmt: skip
    ours = {name for name in loaded["end"] if name.startswith("apppot.host.")}
    ours -= {f"apppot.host.{room}" for room in ROOMS}
    assert ours - allowed == set(), "more than before: is it needed on each run's way?"
    assert allowed - ours == set(), "what is not loaded any more is not to be listed"
    for when, names in loaded.items():
        assert {name.partition(".")[0] for name in names} & BANNED == set(), when
