"""How the hypervisor's process and its helpers are confined for one run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.capabilities.memory import memory_place
from apppot.host.common import terminal
from apppot.host.common.errors import HypervisorError
from apppot.host.confinement import bubblewrap
from apppot.host.confinement.landlock import landlocked
from apppot.host.confinement.sandbox import Confinement, Sandbox, Shown, unconfined
from apppot.host.hypervisor.base import Surroundings, shares
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.machine import fileserver
from apppot.host.machine.run import Run
from apppot.host.plan.confinement import choose
from apppot.host.process.rundir import RunDir


def machine_sandbox(
    record: Run,
    needs: Surroundings,
    capabilities: Capabilities,
    rundir: RunDir,
    private: Sequence[Shown],
    files: Sequence[int],
) -> Sandbox:
    plan = record.plan
    shown = (*_shown_itself(plan), *private)
    record.confinement = choose(plan.confine, capabilities)
    if record.confinement is Confinement.BUBBLEWRAP:
        assert capabilities.bwrap is not None
        return bubblewrap.bubblewrap(
            capabilities.bwrap,
            shown,
            memory=needs.temporary,
            as_root=os.getuid() == 0,
            system=needs.programs,
            libraries=needs.libraries,
            devices=needs.devices,
        )
    view = rundir.directory("view")
    for item in shown:
        folder, _, file = item.name.partition("/")
        # hostfs would show a link to a file as a link: it gets the file's directory, of which
        # the guest shows that file only.
        source = os.path.dirname(item.source) if file else item.source
        os.symlink(os.path.abspath(source), os.path.join(view, folder))
    own = rundir.directory("vm")
    if record.confinement is Confinement.LANDLOCK:
        disks = [Shown("", f"/proc/self/fd/{fd}", writable=True) for fd in files]
        return landlocked(
            [*shown, *disks],
            view,
            own,
            system=needs.programs,
            libraries=needs.libraries,
            devices=needs.devices,
        )
    if plan.confine != "off":
        sys.stderr.write(f"apppot: warning: not confined: {capabilities.bwrap_reason}\n")
    return unconfined(view, own)


def run_directory(
    plan: LaunchPlan,
    needs: Surroundings,
    capabilities: Capabilities,
    tty: terminal.Terminal | None,
) -> RunDir:
    """The run directory; without bubblewrap's own tmpfs, the guest's memory lies in it too."""
    kept = None if tty is None else (tty.fd, tty.settings())
    if choose(plan.confine, capabilities) is Confinement.BUBBLEWRAP:
        return RunDir.create(terminal=kept)
    place, warning = memory_place(needs.temporary)
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
    record: Run,
    capabilities: Capabilities,
    shown: Shown,
    view: str,
    temporary: str,
    *,
    host_network: bool,
) -> Sandbox:
    """How a helper is held that uses one place of the host, as strictly as the plan's machine.

    Where it has no view of its own, `view` is for it to read and `temporary` to write.
    """
    # It can be held where the hypervisor's own processes cannot.
    wish = record.plan.confine if record.hypervisor.confinable else "auto"
    match choose(wish, capabilities):
        case Confinement.BUBBLEWRAP:
            assert capabilities.bwrap is not None
            return bubblewrap.bubblewrap(
                capabilities.bwrap,
                (shown,),
                memory=1 << 20,
                as_root=os.getuid() == 0,
                host_network=host_network,
                system=True,
            )
        case Confinement.LANDLOCK:
            read = Shown("", "/proc/sys/fs/nr_open")  # by virtiofsd
            return landlocked((shown, read), view, temporary, system=True, network=host_network)
        case Confinement.NONE:
            return unconfined(view, temporary)


def file_served(plan: LaunchPlan) -> dict[str, bool]:
    """Directories that have a file server: tag, and whether the guest may write."""
    return dict(shares(plan)) if plan.job.share == fileserver.KIND else {}


def _shown_itself(plan: LaunchPlan) -> list[Shown]:
    """What the machine's own process sees: nothing of what others serve."""
    served = file_served(plan)
    return [item for item in plan.shown if item.name.partition("/")[0] not in served]
