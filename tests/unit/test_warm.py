"""Kept machines: which run may resume from which, and how they lie on the disk.  Starts none."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apppot.guest.protocol.job import Job
from apppot.host.hypervisor.base import Descriptors
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.hypervisor.qemu import Kvm, Qemu
from apppot.host.images.probe import ImageFormat
from apppot.host.images.record import Image
from apppot.host.plan.request import Bind, Request
from apppot.host.warm import key, memory, store

from tests.harness.plans import COMMAND, FOUND, HOST, PROBED, plan


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The files that a plan names: their contents count."""
    for name in ("qemu", "runtime", "image", "changes"):
        (tmp_path / name).write_text(name)
    return tmp_path


class Case:
    """A plan on these files, and the key of the machine that serves it."""

    def __init__(self, files: Path) -> None:
        self.host = replace(HOST, qemu=str(files / "qemu"))
        self.found = replace(FOUND, hypervisor=Qemu(self.host), runtime=str(files / "runtime"))
        self.image = Image(str(files / "image"), ImageFormat.SQUASHFS, None, None, PROBED)
        self.request = Request(self.image, COMMAND)

    def plan(self, request: Request | None = None, **options: Any) -> LaunchPlan:
        return plan(request or self.request, self.found, **options)

    def key(self, request: Request | None = None, **options: Any) -> str:
        request = request or self.request
        made = self.plan(request, **options)
        return key.key(made, request)


@pytest.fixture
def case(files: Path) -> Case:
    return Case(files)


def test_every_field_of_a_job_is_read_before_a_machine_is_kept_or_after() -> None:
    assert set(Job.FIELDS) == key.EARLY | key.LATE
    assert not key.EARLY & key.LATE


def test_what_wakes_it_is_not_in_a_kept_machine(case: Case) -> None:
    job = case.plan(replace(case.request, env={b"SECRET": b"value"}, tty=True)).job
    early = key.early_job(job)
    for name in key.LATE:
        assert getattr(early, name) == getattr(Job, name), name
    assert early.warm
    assert b"value" not in early.dump()


def test_one_machine_serves_many_commands(case: Case) -> None:
    other = replace(
        case.request,
        argv=(b"ls",),
        env={b"A": b"b"},
        workdir="/tmp",
        tty=True,
        forwards=((80, 80),),
    )
    assert case.key() == case.key(other, user="root", time="5m", log="/tmp/log")


def test_a_job_directory_elsewhere_is_the_same_machine(case: Case) -> None:
    before = case.key()
    case.found = replace(case.found, job_directory="/elsewhere")
    assert case.key() == before
    case.found = replace(case.found, job_directory=None)
    assert case.key() != before


OPTIONS = (
    {"memory": "1G"},
    {"network": "none"},
    {"hostname": "other"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_another_machine_is_another_key(case: Case, options: dict[str, Any]) -> None:
    assert case.key(**options) != case.key()


@pytest.mark.parametrize("name", ["qemu", "runtime", "image"])
def test_another_file_is_another_key(case: Case, files: Path, name: str) -> None:
    before = case.key()
    (files / name).write_text(f"another {name}")
    assert case.key() != before


def test_changes_and_binds_are_other_machines(case: Case, files: Path) -> None:
    changes = replace(case.image, path=str(files / "changes"))
    bind = Bind("/data", "/srv", True, False)
    keys = {
        case.key(),
        case.key(replace(case.request, changes=(changes,))),
        case.key(replace(case.request, binds=(bind,))),
        case.key(replace(case.request, binds=(bind, bind))),
    }
    assert len(keys) == 4


def test_an_image_of_the_store_is_known_by_its_digest(case: Case, files: Path) -> None:
    one, two = (
        replace(case.request, image=replace(case.image, digest=digest)) for digest in ("a", "b")
    )
    assert case.key(one) != case.key(two)
    before = case.key(one)
    os.utime(files / "image", (1, 1))
    assert case.key(one) == before


def test_a_clock_that_is_measured_anew_is_the_same_machine(case: Case) -> None:
    before = case.key()
    case.found = replace(case.found, hypervisor=Qemu(replace(case.host, tsc_khz=2_600_123)))
    assert "tsc_early_khz=2600123" in " ".join(
        case.found.hypervisor.argv(case.plan(), "/view", "/tmp", Descriptors(3))
    )
    assert case.key() == before


def test_another_kernel_accelerator_or_cpu_is_another_key(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {case.key()}
    case.found = replace(case.found, kernel=replace(case.found.kernel, digest="another"))
    keys.add(case.key())
    case.found = replace(case.found, hypervisor=Kvm(case.host))
    keys.add(case.key())
    monkeypatch.setattr(key, "host_cpu", lambda: ["model name: another"])
    keys.add(case.key())
    assert len(keys) == 4


CPU = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Some CPU @ 2.00GHz
microcode\t: 0x1
cpu MHz\t\t: {mhz}
flags\t\t: fpu vme

processor\t: 1
model name\t: is not read
"""


def test_a_cpu_is_its_model_and_not_its_clock(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(CPU.format(mhz=1000.0))
    (tmp_path / "two").write_text(CPU.format(mhz=2000.0))
    found = key.host_cpu(str(tmp_path / "one"))
    assert [line.partition("\t")[0] for line in found] == [
        "vendor_id", "model name", "microcode", "flags"
    ]  # fmt: skip
    assert key.host_cpu(str(tmp_path / "two")) == found


def test_what_cannot_resume_starts_cold(case: Case) -> None:
    request = case.request
    assert key.obstacle(case.plan()) == ""
    assert "keeps no machines" in key.obstacle(plan(request))
    assert "disk" in key.obstacle(case.plan(scratch="1G"))
    assert "disk" in key.obstacle(case.plan(replace(request, session_disk="/s")))
    assert "root" in key.obstacle(case.plan(replace(request, image=None)))
    assert "pot" in key.obstacle(case.plan(replace(request, in_pot=True)))
    assert "huge" in key.obstacle(replace(case.plan(), huge=True))
    stock = replace(case.plan(), kernel=replace(case.found.kernel, tuned=False))
    assert "kernel" in key.obstacle(stock)


def memory_file(data: dict[int, bytes], size: int = 64 << 20) -> int:
    fd = os.memfd_create("test")
    os.truncate(fd, size)
    for offset, piece in data.items():
        os.pwrite(fd, piece, offset)
    return fd


SOME = random.Random(1)
MEMORY = {
    0: SOME.randbytes(4096),
    8192: SOME.randbytes(100),
    (3 << 20) + 7: SOME.randbytes(5 << 20),
    20 << 20: bytes(1 << 20),
    (64 << 20) - 1: b"x",
}


def test_memory_comes_back_as_it_was(tmp_path: Path) -> None:
    before, after = memory_file(MEMORY), memory_file({})
    with open(tmp_path / "packed", "wb") as packed:
        extents = memory.pack(before, packed.fileno())
    with open(tmp_path / "packed", "rb") as packed:
        memory.unpack(packed.fileno(), extents, after)
    assert os.pread(after, 64 << 20, 0) == os.pread(before, 64 << 20, 0)
    assert (tmp_path / "packed").stat().st_size < 6 << 20, "zeros were kept"
    assert len(extents) == 3, "pieces near each other are one"


def test_memory_comes_back_in_huge_pages(tmp_path: Path) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    if not setting.exists() or "[deny]" in setting.read_text() or linux() < (6, 1):
        pytest.skip("this kernel has no huge pages for files in memory on demand (Linux 6.1)")
    before, after = memory_file({(3 << 20) + 7: MEMORY[(3 << 20) + 7]}), memory_file({})
    with open(tmp_path / "packed", "wb") as packed:
        extents = memory.pack(before, packed.fileno())
    with open(tmp_path / "packed", "rb") as packed:
        memory.unpack(packed.fileno(), extents, after)
    assert os.fstat(after).st_blocks * 512 == 8 << 20, "5 MB touch four of them"
    assert os.pread(after, 64 << 20, 0) == os.pread(before, 64 << 20, 0)


def linux() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor)


def test_memory_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(b"x" * 4096)
    with open(tmp_path / "packed", "rb") as packed, pytest.raises(ValueError, match="complete"):
        memory.unpack(packed.fileno(), [(0, 8192)], memory_file({}))


FACTS = {"image": "debian-12", "hypervisor": "qemu", "memory": 64 << 20, "cpus": 1}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(0)
    yield tmp_path / "apppot" / "warm"
    os.umask(before)


def keep(name: str) -> store.Kept:
    return store.keep(name, FACTS, memory_file(MEMORY), b"devices")


def test_a_kept_machine_is_its_users_only(home: Path) -> None:
    kept = keep("k")
    assert store.find("k") == kept
    assert (kept.image, kept.memory) == ("debian-12", 64 << 20)
    assert Path(kept.device_file).read_bytes() == b"devices"
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path(kept.folder).iterdir()}
    assert modes == dict.fromkeys(("machine.json", "memory", "devices", "stub"), 0o400)
    assert [path.stat().st_mode & 0o777 for path in (home, Path(kept.folder))] == [0o700, 0o700]


def test_it_replaces_the_one_before(home: Path) -> None:
    keep("k")
    keep("k")
    assert [path.name for path in home.iterdir()] == ["k"]


def test_those_used_longest_ago_go(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST", 2)
    for number, name in enumerate("ab"):
        os.utime(Path(keep(name).folder) / "machine.json", (number, number))
    found = store.find("a")
    assert found is not None
    found.touch()
    keep("c")
    assert {machine.key for machine in store.machines()} == {"a", "c"}


def test_half_of_one_is_swept_unless_somebody_writes_it(home: Path) -> None:
    keep("k")
    for dead in (home / ".making.0123456789abcdef", home / ".gone.0123456789abcdef"):
        dead.mkdir()
        (dead / "memory").touch()
        dead.with_name(f"{dead.name}.lock").touch()
    with store._making() as living:
        store.sweep()
        assert os.path.isdir(living)
    store.sweep()
    assert [path.name for path in home.iterdir()] == ["k"]


def test_nothing_is_left_of_one_that_failed(home: Path) -> None:
    with pytest.raises(OSError, match="Bad file"):
        store.keep("k", FACTS, -1, b"")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1}', '{"version": 1, "extents": 5}'])
def test_a_damaged_record_is_no_machine(home: Path, text: str) -> None:
    path = Path(keep("k").folder) / "machine.json"
    path.chmod(0o600)
    path.write_text(text)
    assert store.find("k") is None
    assert store.machines() == []
