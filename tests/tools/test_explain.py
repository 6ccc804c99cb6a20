"""The words of `--explain` and of a start, for hypervisors that no host of the tests has all of.

All of a start is real here but for the processes that it would start: those are noted.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from apppot.host.common.errors import HypervisorError
from apppot.host.confinement.sandbox import Confinement
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.hypervisor.qemu import Kvm, Qemu
from apppot.host.hypervisor.uml import Uml
from apppot.host.hypervisor.xen import Xen
from apppot.host.machine import launch
from apppot.host.machine.helpers import Helper
from apppot.host.machine.preview import command_line
from apppot.host.plan.request import Bind, Request

from tests.harness.plans import COMMAND, FOUND, HOST, IMAGE, plan
from tests.harness.words import comparable

SERVED = replace(
    HOST,
    virtiofsd="/usr/libexec/virtiofsd",
    qemu_devices=HOST.qemu_devices | {"vhost-user-fs-device", "vhost-user-fs-pci"},
)


def planned(kind: Callable[..., Any], host: Any, **options: str) -> LaunchPlan:
    found = replace(FOUND, hypervisor=kind(host), capabilities=host)
    request = Request(IMAGE, COMMAND, binds=(Bind("/etc", "/mnt", True, False),))
    return plan(request, found, **options)


@pytest.fixture
def executed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[LaunchPlan], tuple[str, ...]]:
    """The words that a start of a plan would execute."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    ends = contextlib.ExitStack()

    def start_network(made: LaunchPlan, *_: object) -> Helper:
        if made.network_helper is None or not made.network_helper.by_descriptor:
            return Helper()
        return Helper(wire=ends.enter_context(socket.socket()))

    def start_file_servers(made: LaunchPlan, *_: object) -> tuple[tuple[str, int], ...]:
        tags = [server.shown.tag for server in made.file_servers]
        return tuple((tag, ends.enter_context(socket.socket()).fileno()) for tag in tags)

    words: list[tuple[str, ...]] = []

    def spawn(argv: tuple[str, ...], **_: object) -> NoReturn:
        words.append(argv)
        raise HypervisorError("nothing is started here")

    monkeypatch.setattr(launch, "start_network", start_network)
    monkeypatch.setattr(launch, "start_file_servers", start_file_servers)
    monkeypatch.setattr(launch, "spawn", spawn)
    monkeypatch.setattr(launch, "hold", lambda path: socket.socket().detach())
    monkeypatch.setattr(launch, "furnished", lambda made, rundir, _: sandbox_of(made, rundir.path))

    def start(made: LaunchPlan) -> tuple[str, ...]:
        with ends, pytest.raises(HypervisorError, match="nothing is started here"):
            launch.run(made)
        return words.pop()

    return start


def sandbox_of(made: LaunchPlan, rundir: str) -> Any:
    # What is shown is not there: only its words are asked for.
    from apppot.host.machine.sandbox import machine_sandbox

    return machine_sandbox(made, rundir)


@pytest.mark.parametrize(
    "made",
    [
        planned(Uml, HOST),
        planned(Uml, HOST, confine="landlock", scratch="1G", network="none"),
        planned(Uml, HOST, job_files="copy"),
        planned(Qemu, HOST),
        planned(Qemu, SERVED),
        planned(Kvm, HOST, cpus="2"),
        planned(Kvm, SERVED, confine="landlock"),
        planned(Kvm, replace(SERVED, slirp=None, qemu_user_network=True)),
        planned(Xen, HOST),
        planned(Xen, HOST, xen_type="pvh", network="none"),
    ],
    ids=lambda made: f"{made.hypervisor.name}-{made.confinement.kind}-{len(made.file_servers)}",
)
def test_what_is_explained_is_what_a_start_executes(
    made: LaunchPlan, executed: Callable[[LaunchPlan], tuple[str, ...]], tmp_path: Path
) -> None:
    made = replace(made, copied=None)
    before = made.job.dump()
    explained = command_line(made)
    first = executed(made)
    assert comparable(explained, first) == explained
    assert made.job.dump() == before
    second = executed(made)
    assert comparable(explained, second) == explained
    assert first != second, "each start has a run directory of its own"


def test_directories_that_are_served_are_not_bound() -> None:
    made = planned(Kvm, SERVED)
    assert made.confinement.kind is Confinement.BUBBLEWRAP
    assert {server.shown.tag for server in made.file_servers} == {"job", "bind0"}
    assert "/view/job" not in command_line(made)
    assert any("chardev=monitor" in word for word in command_line(made))
