"""How the hypervisor's process and its helpers are confined for one run, as the plan says.

What a run directory's path and a plan make is computed alike for a start and for `--explain`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import assert_never

from apppot.host.capabilities.memory import memory_place
from apppot.host.common import terminal
from apppot.host.common.errors import HypervisorError
from apppot.host.confinement.bubblewrap import bubblewrap
from apppot.host.confinement.sandbox import Confinement, Sandbox, Shown, unconfined
from apppot.host.hypervisor.base import Descriptors
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.process.rundir import RunDir


def machine_argv(plan: LaunchPlan, sandbox: Sandbox, inherited: Descriptors) -> tuple[str, ...]:
    """The words that start the plan's machine in `sandbox`, its `machine_sandbox`."""
    words = plan.hypervisor.argv(plan, sandbox.view, sandbox.temporary, inherited)
    return (*sandbox.prefix, *words)


def machine_sandbox(plan: LaunchPlan, rundir: str) -> Sandbox:
    """How the hypervisor's process is started, but for what it does itself before its exec."""
    if plan.confinement.kind is not Confinement.BUBBLEWRAP:
        return unconfined(f"{rundir}/view", f"{rundir}/vm")
    needs = plan.hypervisor.surroundings(plan)
    return bubblewrap(
        plan.confinement.bwrap,
        (*plan.shown_itself, *_private(plan, rundir)),
        memory=needs.temporary,
        as_root=plan.confinement.as_root,
        system=needs.programs,
        libraries=needs.libraries,
        devices=needs.devices,
    )


def furnished(plan: LaunchPlan, rundir: RunDir, files: Sequence[int]) -> Sandbox:
    """`machine_sandbox` with its places made, and what holds a process without bubblewrap.

    `files` are descriptors of the guest's own disks.
    """
    sandbox = machine_sandbox(plan, rundir.path)
    if plan.confinement.kind is Confinement.BUBBLEWRAP:
        return sandbox
    shown = (*plan.shown_itself, *_private(plan, rundir.path))
    view, own = rundir.directory("view"), rundir.directory("vm")
    for item in shown:
        _, _, file = item.name.partition("/")
        # hostfs would show a link to a file as a link: it gets the file's directory, of which
        # the guest shows that file only.
        source = os.path.dirname(item.source) if file else item.source
        os.symlink(os.path.abspath(source), os.path.join(view, item.tag))
    if plan.confinement.kind is Confinement.NONE:
        return sandbox
    from apppot.host.confinement.landlock import landlocked

    needs = plan.hypervisor.surroundings(plan)
    disks = [Shown("", f"/proc/self/fd/{fd}", writable=True) for fd in files]
    return landlocked(
        [*shown, *disks],
        view,
        own,
        system=needs.programs,
        libraries=needs.libraries,
        devices=needs.devices,
    )


def _private(plan: LaunchPlan, rundir: str) -> list[Shown]:
    """What the machine's process sees of its run directory."""
    private = [Shown("net", f"{rundir}/net"), Shown("run", f"{rundir}/own")]
    if plan.hypervisor.exchange:
        private.append(Shown("exchange", f"{rundir}/exchange"))
    return private


def run_directory(plan: LaunchPlan, tty: terminal.Terminal | None) -> RunDir:
    """The run directory; without bubblewrap's own tmpfs, the guest's memory lies in it too."""
    kept = None if tty is None else (tty.fd, tty.settings())
    if plan.confinement.kind is Confinement.BUBBLEWRAP:
        return RunDir.create(terminal=kept)
    place, warning = memory_place(plan.hypervisor.surroundings(plan).temporary)
    if place is None:
        raise HypervisorError(
            f"no place for {plan.memory >> 20} MiB of guest memory: /dev/shm and the temporary "
            "directories are full or mounted noexec",
            "install bubblewrap, or set TMPDIR to a directory that allows exec and has room",
        )
    if warning:
        sys.stderr.write(f"apppot: warning: {warning}\n")
    return RunDir.create(memory=place, terminal=kept)


def hypervisor_environment(sandbox: Sandbox) -> dict[str, str]:
    """The hypervisor's own environment: nothing of the caller's, which may hold secrets."""
    return {"PATH": "/usr/bin:/bin", "HOME": sandbox.temporary, "TMPDIR": sandbox.temporary}


def helper_sandbox(
    plan: LaunchPlan, shown: Shown, view: str, temporary: str, *, host_network: bool
) -> Sandbox:
    """How a helper is held that uses one place of the host, as strictly as the plan's machine.

    Where it has no view of its own, `view` is for it to read and `temporary` to write.
    """
    method = plan.helper_confinement
    match method.kind:
        case Confinement.BUBBLEWRAP:
            return bubblewrap(
                method.bwrap,
                (shown,),
                memory=1 << 20,
                as_root=method.as_root,
                host_network=host_network,
                system=True,
            )
        case Confinement.LANDLOCK:
            from apppot.host.confinement.landlock import landlocked

            read = Shown("", "/proc/sys/fs/nr_open")  # by virtiofsd
            return landlocked((shown, read), view, temporary, system=True, network=host_network)
        case Confinement.NONE:
            return unconfined(view, temporary)
        case other:
            assert_never(other)
