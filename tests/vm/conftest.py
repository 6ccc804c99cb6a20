"""Fixtures of the VM tests: launchers as subprocesses, as the caller and as an ordinary user."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from apppot.host.common import paths
from apppot.host.pot import layout
from apppot.host.process.run import run

from tests.harness.vm import ROOT, Launcher, Terminal, Who, myself

# An id that no account of the host has, as on a cluster whose directory service is away.
ORDINARY = 54321
_USER_HOME = "VM_TESTS_USER_HOME"
_REPORTS = pytest.StashKey[dict[str, pytest.TestReport]]()


def pytest_configure(config: pytest.Config) -> None:
    """A place for the ordinary user that all workers of this session find in their environment.

    Below /tmp itself: pytest's own directories are closed to other users.
    """
    if _USER_HOME not in os.environ:
        os.environ[_USER_HOME] = home = tempfile.mkdtemp(prefix="apppot-vm-user-")
        config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here boots a virtual machine, and none takes long."""
    for item in items:
        if "tests/vm" in str(item.path):
            item.add_marker(pytest.mark.vm)


@functools.cache
def stock_kernel_fails() -> str:
    """What Debian's kernel says where it cannot run here whoever starts it; empty where it can.

    6.1's place for a process's floating-point registers is too small for processors with AMX: it
    kills its first process.  Seen by starting it without AppPot.
    """
    words = ["/usr/bin/linux.uml", "mem=64M", f"ubd0r={layout.find_runtime()}", "root=/dev/ubda"]
    words += ["ro", "rootfstype=ext4", "init=/usr/bin/python3", "con=null", "con0=null,fd:1"]
    words += ["--", "-c", "pass"]  # where it can run, its init ends, and it with that
    with tempfile.TemporaryDirectory() as home:
        env = {"HOME": home, "PATH": os.defpath}
        done = run(words, check=False, timeout=60, env=env)
    lines = (done.stdout + done.stderr).decode(errors="replace").splitlines()
    return next((line.strip() for line in lines if "set fp regs failed" in line), "")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs Debian's kernel where that cannot run, with its own words."""
    if not item.get_closest_marker("stock") or not os.path.exists("/usr/bin/linux.uml"):
        return
    if reason := stock_kernel_fails():
        pytest.skip(f"Debian's kernel cannot run on this processor: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]
    item.stash.setdefault(_REPORTS, {})[report.when or ""] = report
    return report  # type: ignore[return-value]


def _show_console(request: pytest.FixtureRequest, launcher: Launcher) -> None:
    """After a failure, the guest's console stands in the test's report."""
    report = request.node.stash.get(_REPORTS, {}).get("call")
    if report is None or not report.failed:
        return
    sys.stderr.write(f"guest console of {request.node.nodeid} ({launcher.log}):\n")
    if launcher.log.is_file():
        sys.stderr.write(launcher.log.read_text(errors="replace")[-1500:])


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory of the test that an ordinary user can reach."""
    path = Path(tempfile.mkdtemp(prefix="apppot-vm-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


Factory = Callable[[Who], Launcher]


@pytest.fixture
def launcher_for(request: pytest.FixtureRequest, place: Path) -> Iterator[Factory]:
    """Makes launchers for an account; ends all that they started."""
    made: list[Launcher] = []

    def make(who: Who) -> Launcher:
        directory = place / f"launcher{len(made)}"
        directory.mkdir()
        made.append(Launcher(directory, who))
        return made[-1]

    yield make
    for launcher in made:
        _show_console(request, launcher)
        launcher.close()


@pytest.fixture
def apppot(launcher_for: Factory) -> Launcher:
    """A launcher of the account that runs the tests."""
    return launcher_for(myself())


@pytest.fixture
def user(launcher_for: Factory, ordinary: Who) -> Launcher:
    """A launcher of an ordinary user."""
    return launcher_for(ordinary)


@pytest.fixture
def on_terminal(apppot: Launcher) -> Iterator[Callable[..., Terminal]]:
    """Starts launchers on terminals and closes these."""
    made: list[Terminal] = []

    def make(*words: str | bytes, **options: object) -> Terminal:
        made.append(apppot.terminal(*words, **options))
        return made[-1]

    yield make
    for terminal in made:
        terminal.running.kill()
        terminal.close()


@pytest.fixture(scope="session")
def ordinary() -> Who:
    """An ordinary user with program, pot and image in places that it can read."""
    if os.getuid() != 0:
        return myself()
    home = Path(os.environ[_USER_HOME])
    with open(home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ready").exists():
            _furnish(home)
            (home / "ready").touch()
    program = "from apppot.host.cli import main; main()"
    env = {
        "HOME": str(home / "home"),
        "PYTHONPATH": str(home / "lib"),
        "APPPOT_POT": str(home / "pot"),
        "APPPOT_SITE_STORE": str(home / "site"),
        "XDG_DATA_HOME": str(home / "home" / "data"),
        "XDG_CACHE_HOME": str(home / "home" / "cache"),
    }
    return Who(ORDINARY, ORDINARY, ("/usr/bin/python3", "-c", program), env)


def _furnish(home: Path) -> None:
    for part in ("guest", "host"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, home / "lib" / "apppot" / part, ignore=ignored)
    ignored = shutil.ignore_patterns("work")
    shutil.copytree(paths.pot_home(), home / "pot", ignore=ignored, symlinks=True)
    _copy_images(home / "site" / "images")
    (home / "home").mkdir()
    os.chown(home / "home", ORDINARY, ORDINARY)
    for path in (home, *home.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))


def _copy_images(target: Path) -> None:
    for store in reversed(paths.image_stores()):
        if os.path.isdir(os.path.join(store, "names")):
            ignored = shutil.ignore_patterns("tmp", "builds")
            shutil.copytree(store, target, ignore=ignored, symlinks=True, dirs_exist_ok=True)
