"""Two PID namespaces with one home directory: what lives in one is not swept from the other.

Both say the same host name, and the process of the one is not there for the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "tests" / "typeroot"
SECONDS = 30
NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
READY = "print('ready', flush=True); sys.stdin.read()"

SESSION = f"""
from apppot.host.common import unfinished
from apppot.host.images import sessions
os.makedirs(sessions.home(), exist_ok=True)
with unfinished.making(sessions.home(), sessions._MAKING) as work:
    os.mkdir(work)
    {READY}
"""
SWEEP_SESSIONS = """
from apppot.host.images import sessions
sessions.create(f"other{os.urandom(4).hex()}", "i", "b")
print(*(name for name in sorted(os.listdir(sessions.home())) if name.startswith(".making")))
"""
MACHINE = f"""
from apppot.host.warm import store
os.makedirs(store.home(), exist_ok=True)
with store._making():
    {READY}
"""
SWEEP_MACHINES = """
from apppot.host.warm import store
store.sweep()
print(*sorted(os.listdir(store.home())))
"""
RESULT = f"""
from apppot.host.images.changes import inguest
with inguest.result("out.changes") as work:
    open(work, "w").close()
    {READY}
"""
SWEEP_RESULTS = """
from apppot.host.images.changes import inguest
with inguest.result("out.changes") as work:
    print(*(n for n in sorted(os.listdir()) if n.startswith(".out") and n not in work + ".lock"))
    open(work, "w").close()
"""
RUN = f"""
from apppot.host.runs.recorder import Recorder
recorder = Recorder("image", ["true"], "vm")
recorder.claim()
recorder.started()
{READY}
"""
# Keeps no more than one record that is over.
PRUNE = """
from apppot.host.runs import records
from apppot.host.runs.recorder import Recorder
records._KEPT = 1
for name in "abc":
    one = Recorder("image", ["true"], name)
    one.claim()
    one.ended(0)
record = [one for one in records.kept_records() if one.name == "vm"]
print(*(records.state(one) for one in record))
"""
TAKE_NAME = """
from apppot.host.runs import records
from apppot.host.runs.recorder import Recorder
try:
    Recorder("image", ["true"], "vm").claim()
except records.RunError as error:
    print(error.cause)
"""
REMOVE = """
from apppot.host.runs import records
try:
    records.remove(records.removable(["vm"])[0])
    print("removed")
except records.RunError as error:
    print(error.cause)
"""


# Processes before it, so that its number is nobody's in the other namespace.
LATER = ("sh", "-c", 'true & true & wait; "$@"; exit $?', "sh")


def argv(script: str, *before: str) -> list[str]:
    program = f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"
    return [*NAMESPACE, "--mount-proc", *before, sys.executable, "-c", program]


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.chdir(tmp_path)
    homes = ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "TMPDIR")
    return {**os.environ, **{name: str(tmp_path) for name in homes}}


@contextmanager
def living(script: str, env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process in a namespace of its own that is at its work; killed afterwards."""
    pipe = subprocess.PIPE
    words = argv(script, *LATER)
    with subprocess.Popen(words, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            process.stdout.read()  # until all of them are gone, stdin being open still


def said(script: str, env: dict[str, str]) -> str:
    """What a process in another namespace prints."""
    done = subprocess.run(
        argv(script), env=env, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    made = subprocess.run([*NAMESPACE, "--mount-proc", "true"], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip("this host lets us make no PID namespace")


@pytest.mark.parametrize(
    ("work", "sweep"),
    [(SESSION, SWEEP_SESSIONS), (MACHINE, SWEEP_MACHINES), (RESULT, SWEEP_RESULTS)],
    ids=["session", "kept machine", "changes"],
)
def test_live_work_stays_and_what_a_kill_leaves_goes(
    work: str, sweep: str, env: dict[str, str]
) -> None:
    with living(work, env):
        assert len(said(sweep, env).split()) == 2, "the work and its lock"
    assert said(sweep, env) == ""


def test_a_run_is_live_wherever_it_is_looked_at(env: dict[str, str]) -> None:
    with living(RUN, env):
        assert said(PRUNE, env) == "running"
        assert said(TAKE_NAME, env).startswith("the name vm is taken")
        assert said(REMOVE, env) == "run vm is under way"
    assert said(REMOVE, env) == "removed"


def test_the_record_of_a_killed_run_is_pruned(env: dict[str, str]) -> None:
    with living(RUN, env):
        pass
    assert said(PRUNE, env) == ""
