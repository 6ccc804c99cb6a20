"""What is known of this machine: gathered once, for checks that are pure."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.capabilities.memory import Memory, file_system
from apppot.host.common.frozen import frozen
from apppot.host.config.settings import Setting, Settings
from apppot.host.doctor.buildtools import missing_tools
from apppot.host.hypervisor.base import HypervisorName, Verdict
from apppot.host.pot.layout import Kernel


@frozen
class Place:
    """A directory that could hold files of a run; `free` in bytes."""

    path: str
    kind: str  # the file system's type
    free: int
    allows_exec: bool


@frozen
class Facts:
    """Everything that the checks look at.  A problem is None where there is none."""

    root: bool
    hypervisor: Setting[str]
    verdicts: tuple[tuple[HypervisorName, Verdict], ...]
    kernel: Kernel | None
    kernel_problem: str
    stale_kernel: bool
    x86_kernel: str | None  # release
    x86_kernel_problem: str
    stale_x86_kernel: bool
    lpj: int | None
    runtime: str | None
    runtime_problem: str
    stale_runtime: bool
    capabilities: Capabilities
    setpriv: bool
    user_namespaces: str  # why they do not work; empty where they do
    confine: Setting[str]
    memory: Setting[int]
    room: Memory
    memory_place: tuple[str | None, str]  # without bubblewrap: (path, what to warn of)
    shm: Place | None
    run_place: Place | None
    cpus: tuple[int, ...]
    free_cpus: tuple[int, ...]
    store: Place | None
    images: tuple[str, ...]
    missing_tools: tuple[tuple[str, tuple[str, ...], str], ...]  # (for what, tools, remedy)


def gather(settings: Settings, env: Mapping[str, str] = os.environ) -> Facts:
    """Look at this machine for a guest with these settings.  Starts small tools, no guest."""
    from apppot.host.capabilities import capabilities
    from apppot.host.capabilities import memory as memory_module
    from apppot.host.common import paths
    from apppot.host.hypervisor.choice import probed
    from apppot.host.pot.layout import lpj_for

    able = capabilities.limited(
        capabilities.probe(env, fresh=True),
        settings.qemu_machine.value,
        settings.qemu_share.value,
    )
    kernel, kernel_problem = _kernel(settings.kernel.value)
    runtime, runtime_problem = _runtime(settings.kernel.value, kernel)
    x86_kernel, x86_problem = _x86_kernel()
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    return Facts(
        root=os.getuid() == 0,
        hypervisor=settings.hypervisor,
        verdicts=tuple((one.name, verdict) for one, verdict in probed(able)),
        kernel=kernel,
        kernel_problem=kernel_problem,
        stale_kernel=settings.kernel.value is None and kernel is not None and _stale("uml"),
        x86_kernel=x86_kernel,
        x86_kernel_problem=x86_problem,
        stale_x86_kernel=x86_kernel is not None and _stale("x86_64"),
        lpj=None if kernel is None else lpj_for(kernel),
        runtime=runtime,
        runtime_problem=runtime_problem,
        stale_runtime=runtime is not None and _stale_runtime(),
        capabilities=able,
        setpriv=shutil.which("setpriv") is not None,
        user_namespaces=_user_namespaces(),
        confine=settings.confine,
        memory=settings.memory,
        room=memory_module.memory(),
        memory_place=memory_module.memory_place(settings.memory.value, env),
        shm=_place("/dev/shm"),
        run_place=_run_place(env),
        cpus=cpus,
        free_cpus=_free(cpus),
        store=_place(_existing(paths.data_home(env))),
        images=_images(),
        missing_tools=missing_tools(),
    )


def _kernel(wanted: str | None) -> tuple[Kernel | None, str]:
    from apppot.host.common.errors import PotError
    from apppot.host.pot.layout import find_kernel

    try:
        return find_kernel(kernel=wanted), ""
    except PotError as error:
        return None, str(error)


def _x86_kernel() -> tuple[str | None, str]:
    from apppot.host.common.errors import PotError
    from apppot.host.pot.layout import find_x86_kernel

    try:
        return find_x86_kernel().release, ""
    except PotError as error:
        return None, str(error)


def _runtime(wanted: str | None, kernel: Kernel | None) -> tuple[str | None, str]:
    from apppot.host.common.errors import PotError
    from apppot.host.pot.layout import BUILD_HINT, find_pot

    try:
        return find_pot(kernel=wanted).runtime, ""
    except PotError as error:
        # Without a kernel the error speaks of that, which has a check of its own.
        known = kernel is not None
        return None, str(error) if known else f"not looked for\n  remedy: {BUILD_HINT}"


def _stale(name: str) -> bool:
    """Whether the pot's kernel is known to come from another recipe than this tree's."""
    from apppot.host.common.errors import BuildError
    from apppot.host.pot import layout, recipes, store

    current = store.current(layout.KINDS[name])
    try:
        return current is not None and current[1].get("recipe") != recipes.load_kernel(name).digest
    except BuildError:  # installed without recipes
        return False


def _stale_runtime() -> bool:
    from apppot.host.pot.runtime import up_to_date

    return up_to_date() is False


def _user_namespaces() -> str:
    from apppot.host.process.run import ToolError, run

    try:
        run(["unshare", "--user", "true"], timeout=20)
    except ToolError as error:
        return error.cause.splitlines()[-1].strip()
    return ""


def _place(path: str) -> Place | None:
    """The directory `path` as a place for files; None where it is not one."""
    if not (os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)):
        return None
    stat = os.statvfs(path)
    allows_exec = not stat.f_flag & os.ST_NOEXEC
    return Place(path, file_system(path), stat.f_bavail * stat.f_frsize, allows_exec)


def _run_place(env: Mapping[str, str]) -> Place | None:
    """The first place that a run directory can be made in, as the launcher chooses it."""
    from apppot.host.process.rundir import candidates

    found = (_place(path) for path in candidates(env))
    return next((place for place in found if place is not None), None)


def _existing(path: str) -> str:
    """`path`, or the nearest directory above it that exists."""
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    return path


def _free(cpus: tuple[int, ...]) -> tuple[int, ...]:
    """Those CPUs that no guest holds."""
    from apppot.host.process.cpus import hold

    holds = [hold([cpu]) for cpu in cpus]
    for held in holds:
        if held is not None:
            held.release()
    return tuple(held.cpu for held in holds if held is not None)


def _images() -> tuple[str, ...]:
    from apppot.host.common.errors import ImageError
    from apppot.host.images import store

    try:
        rows = store.list_images()
    except ImageError:
        return ()
    return tuple(sorted({f"{r.name}:{r.version}" for _, r in rows if r.version}))
