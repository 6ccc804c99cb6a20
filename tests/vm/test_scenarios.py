"""The scenarios that every hypervisor must pass, on User-Mode Linux, over several base images.

On KVM and Xen they run in the hypervisor lab: `make lab`.  Images of other distributions that the
tests cannot make take part when they are in the store under the names of IMPORTED.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from apppot.host.common.errors import ApppotError

from tests.scenarios import images, suite
from tests.scenarios.runner import IMAGE, Runner, build_proven
from tests.scenarios.suite import Scenario

IMPORTED = {
    "alpine": "Alpine's minirootfs is not in the archives that the tests reach",
    "fedora": "no RPM distribution's root is in the archives that the tests reach: Debian has dnf "
    "and zypper, but the packages of a root come from Fedora's or openSUSE's own servers",
}
# What an image has most to do with.
EMULATED = ("job directory", "sudo")


@dataclass(frozen=True)
class Base:
    """A base image, and the program that looks around from inside, built for it."""

    image: str
    proven: Path


Bases = Callable[[str], Base]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """Finds or makes a base image by its name."""
    folder = tmp_path_factory.mktemp("scenarios")
    proven = build_proven(folder / "proven")

    @cache
    def find(name: str) -> Base | ApppotError:
        try:
            if name == "musl":
                musl = images.Musl(tmp_path_factory.mktemp("musl"))
                return Base(musl.image(), musl.proven())
            return Base(images.built(name) if name == "debian-13" else name, proven)
        except ApppotError as error:
            return error

    def find_or_skip(name: str) -> Base:
        found = find(name)
        if isinstance(found, ApppotError):
            pytest.skip(f"{name} cannot be made here: {found}")
        return found

    return find_or_skip


NAMES = [IMAGE, "debian-13", "musl", *filter(images.stored, IMPORTED)]


@pytest.mark.timeout(900)  # the first of debian-13 builds it
@pytest.mark.parametrize("scenario", suite.load(), ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("name", NAMES)
def test_scenario(name: str, scenario: Scenario, bases: Bases, place: Path) -> None:
    base = bases(name)
    result = Runner("uml", place, base.proven, image=base.image).run(scenario)
    assert not result.problem, result.problem
    assert "Linux 7.2" in result.evidence


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed")
@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("scenario", EMULATED)
def test_scenario_on_an_emulated_processor(
    name: str, scenario: str, bases: Bases, place: Path
) -> None:
    base = bases(name)
    (chosen,) = (item for item in suite.load() if item.name == scenario)
    result = Runner("qemu", place, base.proven, image=base.image).run(chosen)
    assert not result.problem, result.problem
    assert "Linux 7.2" in result.evidence


@pytest.mark.parametrize("name", IMPORTED)
def test_an_imported_image_takes_part(name: str) -> None:
    if not images.stored(name):
        pytest.skip(f"{IMPORTED[name]}; where you have it: apppot image import FILE --name {name}")
    assert name in NAMES


def test_musl_is_another_system(bases: Bases, place: Path) -> None:
    """The control: what it must not have is not there, and its loader is needed."""
    base = bases("musl")
    listed = subprocess.run(
        ["unsquashfs", "-l", "-d", "", base.image], capture_output=True, text=True, check=True
    )
    names = {Path(line).name for line in listed.stdout.splitlines()}
    assert "busybox" in names
    assert not names & {"bash", "sudo", "ld-linux-x86-64.so.2", "libc.so.6"}
    assert not [name for name in names if name.startswith("python")]
    result = Runner("uml", place, base.proven).run(suite.load()[0])
    assert "./proven: No such file or directory" in result.problem


def test_another_hypervisor_shows(bases: Bases, place: Path) -> None:
    """The control: a suite for KVM that ran on something else has not passed."""

    class Astray(Runner):
        def environment(self, own: Path) -> dict[str, str]:
            env = super().environment(own)
            return {**env, "RUN": env["RUN"].replace("--hypervisor kvm", "--hypervisor uml")}

    result = Astray("kvm", place, bases(IMAGE).proven).run(suite.load()[0])
    assert result.problem == "this was not kvm but uml"
