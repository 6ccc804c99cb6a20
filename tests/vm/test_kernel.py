"""What the pot's kernel claims (image-recipes/kernel/uml/patches), tested in the guest.

Each claim is a C program in `kernel/`: it prints "ok" or "FAILED" with key=value pairs, and its
exit status says the same.  They are linked statically and run through the job directory, from
the image `host`, so that no base image is needed.  The controls on Debian's stock kernel show
that a test can fail.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from apppot.host.process.run import Completed, run

PROGRAMS = Path(__file__).parent / "kernel"
APPPOT = Path(sys.executable).with_name("apppot")
STOCK = shutil.which("linux.uml")
FLAGS = ("-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")
ON_STOCK = ("--kernel", STOCK or "")
GUEST_SECONDS = 100.0

pytestmark = pytest.mark.timeout(GUEST_SECONDS + 20)
needs_stock = pytest.mark.skipif(STOCK is None, reason="user-mode-linux is not installed")


@dataclass(frozen=True)
class Verdict:
    """What one program found; `values` are its key=value pairs, numbers all."""

    ok: bool
    values: dict[str, float]


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the compiled programs."""
    folder = tmp_path_factory.mktemp("kernel")
    for source in sorted(PROGRAMS.glob("*.c")):
        run(["gcc", *FLAGS, "-o", folder / source.stem, source], hint="apt-get install gcc")
    return folder


@pytest.fixture
def job(programs: Path, tmp_path: Path) -> Path:
    """A fresh job directory with the programs in it."""
    for program in programs.iterdir():
        os.link(program, tmp_path / program.name)
    return tmp_path


def start(job: Path, command: str, *options: str) -> Completed:
    """Run `command` in a guest, whatever becomes of it."""
    words = [str(APPPOT), "run", *options, "host", *command.split()]
    return run(words, cwd=job, check=False, timeout=GUEST_SECONDS)


def finding(job: Path, command: str, *options: str) -> Verdict:
    """The verdict of the program `command` in a guest; fails where it gave none."""
    done = start(job, f"./{command}", *options)
    word, *pairs = done.stdout.decode().split() or [""]
    assert word in ("ok", "FAILED"), f"no verdict, status {done.returncode}: {done.stderr!r}"
    assert done.returncode == (0 if word == "ok" else 1)
    split = (pair.partition("=") for pair in pairs)
    return Verdict(word == "ok", {key: float(value) for key, _, value in split})


@pytest.mark.vm
def test_the_kernel_is_the_pots_own(job: Path) -> None:
    """The other tests speak of the tuned kernel only if it is the one that ran them."""
    done = start(job, "cat /proc/cmdline /proc/sys/kernel/osrelease")
    release = done.stdout.decode().split()[-1]
    assert release != os.uname().release
    assert tuple(int(part) for part in release.split(".")[:2]) >= (7, 2)


# -- 0001: unmaps and dirty bits ----------------------------------------------------------------


@pytest.mark.vm
@pytest.mark.parametrize("cpus", ["1", "2"])
def test_mremap_leaves_no_stale_pages(job: Path, cpus: str) -> None:
    found = finding(job, "mremap_over", "--cpus", cpus)
    assert found.ok and found.values["stale"] == 0


@pytest.mark.vm
def test_kernel_writes_to_swapped_in_pages_are_kept(job: Path) -> None:
    found = finding(job, "swapped_in_writes", "-u", "root")
    # All 32 MB went to swap, came back, and went again: without that nothing was tested.
    assert found.values["swapped_kb"] >= 32000 and found.values["swapped_again_kb"] >= 32000
    assert found.ok and found.values["lost"] == 0


# -- 0002: host mappings are a cache ------------------------------------------------------------


@pytest.mark.vm
@pytest.mark.parametrize("cpus", ["1", "2"])
@pytest.mark.parametrize("mode", ["private", "shared", "forked", "threaded"])
def test_random_touch_of_much_memory(job: Path, mode: str, cpus: str) -> None:
    found = finding(job, f"random_touch {mode} 420", "--mem", "1200M", "--cpus", cpus)
    assert found.ok and found.values["wrong"] == 0


@pytest.mark.vm
def test_more_mappings_than_the_host_allows(job: Path) -> None:
    """Scattered pages need a host mapping each: more than vm.max_map_count of them."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 65530:
        pytest.skip(f"vm.max_map_count is {limit} here: 300 MB do not reach it")
    found = finding(job, "random_touch scattered 300", "--mem", "1G")
    assert found.ok and found.values["pages"] > limit


@pytest.mark.vm
@pytest.mark.parametrize(
    ("cpus", "size"), [("1", "1 400 10"), ("2", "4 100 10")], ids=["one CPU", "two CPUs"]
)
def test_stress_with_verification(job: Path, cpus: str, size: str) -> None:
    found = finding(job, f"stress {size}", "--mem", "1G", "--cpus", cpus)
    assert found.ok and found.values["bad"] == 0


@pytest.mark.vm
def test_reading_untouched_memory_costs_none(job: Path) -> None:
    found = finding(job, "sparse read 4096 65536")
    assert found.ok and found.values["grown_kb"] < 1024


@pytest.mark.vm
def test_sparse_writes_beyond_memory_get_exact_pages(job: Path) -> None:
    """As many windows as make 1 GB, in a guest of 512 MB: only single pages make them fit."""
    found = finding(job, "sparse write 1024 65536", "--mem", "512M")
    assert found.ok and found.values["grown_kb"] < 480 << 10


@pytest.mark.vm
def test_fragmented_memory_is_used_without_reclaim(job: Path) -> None:
    found = finding(job, "fragmented 300")
    assert found.ok and found.values["reclaimed"] == 0


@pytest.mark.vm
def test_windows_do_not_show_in_files(job: Path) -> None:
    assert finding(job, "tmpfs_windows", "-u", "root").ok


@pytest.mark.vm
def test_memory_cgroup_limits_hold(job: Path) -> None:
    assert finding(job, "memory_limit", "-u", "root").ok


@pytest.mark.vm
def test_a_child_does_not_see_its_parents_later_writes(job: Path) -> None:
    found = finding(job, "fork_snapshot", "--cpus", "2")
    assert found.ok and found.values["seen"] == 0


@pytest.mark.vm
@pytest.mark.parametrize("cpus", ["1", "2"])
def test_single_stepping_through_faults(job: Path, cpus: str) -> None:
    assert finding(job, "single_step", "--mem", "512M", "--cpus", cpus).ok


# -- 0004: user and system time -----------------------------------------------------------------


@pytest.mark.vm
@pytest.mark.parametrize("cpus", ["1", "2"])
def test_user_and_system_time_are_told_apart(job: Path, cpus: str) -> None:
    assert finding(job, "cpu_times", "--cpus", cpus).ok


# -- 0006: metadata on the host -----------------------------------------------------------------

OLD = 1_000_000_000 * 10**9


def prepare(job: Path) -> None:
    """The files that hostfs_metadata works on, all of an old date."""
    for name in ("exact", "touched", "victim", "precious"):
        (job / name).write_text("content")
        (job / name).chmod(0o644)
        os.utime(job / name, ns=(OLD, OLD))
    (job / "link").symlink_to("precious")


def replace_victim(job: Path) -> None:
    """Once the guest holds `victim`, put a symbolic link in its place."""
    deadline = time.monotonic() + GUEST_SECONDS
    while not (job / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (job / "new").symlink_to("precious")
    (job / "new").rename(job / "victim")
    (job / "replaced").touch()


def hostfs_metadata(job: Path, *options: str) -> Verdict:
    prepare(job)
    other_side = threading.Thread(target=replace_victim, args=(job,), daemon=True)
    other_side.start()
    return finding(job, "hostfs_metadata", *options)


@pytest.mark.vm
def test_metadata_reaches_the_host_exactly(job: Path) -> None:
    began = time.time_ns()
    assert hostfs_metadata(job).ok
    exact, link = (job / "exact").stat(), (job / "link").lstat()
    assert (exact.st_atime_ns, exact.st_mtime_ns) == (1000000000987654321, 1111111111123456789)
    assert link.st_mtime_ns == 1234567890000000002
    assert (job / "touched").stat().st_mtime_ns >= began


@pytest.mark.vm
def test_no_change_goes_through_a_link_that_took_a_files_place(job: Path) -> None:
    found = hostfs_metadata(job)
    assert found.values["chmod"] == -1 and found.values["truncate"] == -1
    precious = (job / "precious").stat()
    assert (precious.st_mode & 0o777, precious.st_size, precious.st_mtime_ns) == (0o644, 7, OLD)


# -- the controls: what the same programs find on Debian's stock kernel -------------------------


@pytest.mark.stock
@needs_stock
def test_stock_kernel_cannot_touch_300_mb_at_random(job: Path) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 65530:
        pytest.skip(f"vm.max_map_count is {limit} here: 300 MB do not reach it")
    assert start(job, "./random_touch private 300", *ON_STOCK, "--mem", "1G").returncode not in (
        0,
        1,
        2,
    )


@pytest.mark.stock
@needs_stock
def test_stock_kernel_mixes_user_and_system_time(job: Path) -> None:
    assert not finding(job, "cpu_times", *ON_STOCK).ok


@pytest.mark.stock
@needs_stock
def test_stock_kernel_changes_what_a_link_points_to(job: Path) -> None:
    found = hostfs_metadata(job, *ON_STOCK)
    assert not found.ok and found.values["exact"] == 0
    assert (job / "precious").stat().st_mode & 0o777 == 0o600
