"""What a machine can do for a guest, and what would mend it.

`gather` looks at the machine once; each check is a pure function of those Facts.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import assert_never

from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.common.errors import HypervisorError
from apppot.host.common.frozen import frozen
from apppot.host.common.units import format_size
from apppot.host.confinement.sandbox import Confinement
from apppot.host.doctor.buildtools import KERNEL_WORKS
from apppot.host.doctor.facts import Facts
from apppot.host.hypervisor.base import HypervisorName
from apppot.host.plan.confinement import choose
from apppot.host.pot.layout import KERNEL_HINT

NEEDS_SETPRIV = "apt-get install util-linux"
# A guest page is one host mapping in the worst case, on a kernel without our patches.
_PAGE = 4096
_LITTLE_ROOM = 2 << 30
_LANDLOCK_SCOPES = 6  # the first version that holds signals and abstract sockets


class Mark(StrEnum):
    """The verdict of a check: fine, a guest runs but something is lost, no guest can run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@frozen
class Check:
    """One verdict with its reason, and what helps where it is not OK."""

    name: str
    mark: Mark
    reason: str
    remedy: str = ""


# -- checks: pure ----------------------------------------------------------------------------


def check_hypervisor(facts: Facts) -> Check:
    """Whether the hypervisor that is asked for can be tried."""
    wanted = str(facts.hypervisor.value)
    known = dict(facts.verdicts)
    if wanted != "auto" and wanted not in known:
        return Check(
            "hypervisor",
            Mark.FAIL,
            f"{facts.hypervisor.origin} asks for {wanted}, which this version cannot start",
            f"use one of: auto, {', '.join(known)}",
        )
    chosen = {n: v for n, v in known.items() if wanted in ("auto", n)}
    usable = [f"{name}: {verdict.reason}" for name, verdict in chosen.items() if verdict.usable]
    if usable:
        return Check("hypervisor", Mark.OK, "; ".join(usable))
    reasons = "; ".join(f"{name}: {verdict.reason}" for name, verdict in chosen.items())
    remedies = [verdict.remedy for verdict in chosen.values() if verdict.remedy]
    return Check("hypervisor", Mark.FAIL, reasons, "; ".join(remedies))


def check_kernel(facts: Facts) -> Check:
    """The guest kernel: the pot's own, a stock one, none."""
    kernel = facts.kernel
    if kernel is None:
        return Check("kernel", Mark.FAIL, *_split(facts.kernel_problem))
    if kernel.tuned:
        if facts.stale_kernel:
            reason = f"{kernel.release}, built from another recipe than this version's"
            return Check("kernel", Mark.WARN, reason, "bring it up to date: `apppot kernel build`")
        words = ", ".join(sorted(kernel.features))
        return Check("kernel", Mark.OK, f"{kernel.release}, the pot's own ({words})")
    reason = f"{kernel.release} is not the pot's own: slower, and it can lose data in a guest"
    return Check("kernel", Mark.WARN, reason, KERNEL_HINT)


def check_x86_kernel(facts: Facts) -> Check:
    """The kernel for KVM, QEMU and exported disks."""
    name = "x86-64 kernel"
    if facts.x86_kernel is None:
        cause, remedy = _split(facts.x86_kernel_problem)
        return Check(name, Mark.WARN, f"{cause}: neither KVM nor Xen nor QEMU can be used", remedy)
    if facts.stale_x86_kernel:
        reason = f"{facts.x86_kernel}, built from another recipe than this version's"
        remedy = "bring it up to date: `apppot kernel build x86_64`"
        return Check(name, Mark.WARN, reason, remedy)
    return Check(name, Mark.OK, f"{facts.x86_kernel}, the pot's own")


def check_qemu(facts: Facts) -> Check | None:
    """What this host's QEMU gives to guests of QEMU and KVM, and what they go without."""
    from apppot.host.hypervisor.qemu import INSTALL_HINT, Qemu

    verdict, qemu = dict(facts.verdicts).get(HypervisorName.QEMU), Qemu(facts.capabilities)
    if verdict is None:
        return None
    if not verdict.usable:
        return Check("QEMU", Mark.WARN, f"{verdict.reason}: no KVM either", verdict.remedy)
    text = f"{'.'.join(map(str, facts.capabilities.qemu_version))}, {qemu.machine.name}"
    if qemu.share is None:
        reason = f"{text}, neither virtiofs nor 9p: the job directory is copied, binds are refused"
        return Check("QEMU", Mark.WARN, reason, f"{INSTALL_HINT} virtiofsd")
    if qemu.network_device is None:
        return Check("QEMU", Mark.WARN, f"{text}, without network devices", INSTALL_HINT)
    return Check("QEMU", Mark.OK, f"{text}, directories by {qemu.share}")


def check_calibration(facts: Facts) -> Check | None:
    """Whether the kernel's delay loop is measured on this machine (lpj)."""
    if facts.kernel is None:
        return None
    if facts.lpj is not None:
        return Check("calibration", Mark.OK, f"lpj={facts.lpj}, measured on this machine")
    reason = "this machine's delay loop is not measured: each guest measures it as it starts"
    return Check("calibration", Mark.WARN, reason, "`apppot doctor --boot` measures it once")


def check_runtime(facts: Facts) -> Check:
    """The runtime, which each guest starts from."""
    if facts.runtime is None:
        return Check("runtime", Mark.FAIL, *_split(facts.runtime_problem))
    if facts.stale_runtime:
        reason = "not this version's: its agent may not know what the launcher asks for"
        return Check("runtime", Mark.WARN, reason, "bring it up to date: `apppot pot build`")
    return Check("runtime", Mark.OK, facts.runtime)


def check_confinement(facts: Facts) -> Check:
    """How the hypervisor's process is held, and what this host cannot hold."""
    able, name = facts.capabilities, "confinement"
    try:
        how = choose(facts.confine.value, able, as_root=facts.root).kind
    except HypervisorError as error:
        return Check(name, Mark.FAIL, error.cause, error.hint)
    match how:
        case Confinement.BUBBLEWRAP:
            if facts.root and not facts.setpriv:
                return Check(name, Mark.FAIL, "setpriv is not installed", NEEDS_SETPRIV)
            return Check(name, Mark.OK, "bubblewrap: a guest sees only what its plan shows")
        case Confinement.LANDLOCK:
            return Check(name, Mark.OK, _landlock(able))
        case Confinement.NONE:
            asked_for = facts.confine.value == "off"
            why = facts.confine.origin if asked_for else f"{able.bwrap_reason}, no Landlock"
            remedy = "leave `confine` at auto" if asked_for else CONFINE_REMEDY
            reason = f"none ({why}): a guest's root could do what you can do"
            return Check(name, Mark.WARN, reason, remedy)
        case _:
            assert_never(how)


CONFINE_REMEDY = (
    "install bubblewrap and allow unprivileged user namespaces; "
    "`--confine required` refuses to start without"
)


def _landlock(able: Capabilities) -> str:
    gaps = "names and metadata of files, and processes, stay visible"
    if able.landlock < _LANDLOCK_SCOPES:
        gaps += "; signals to your processes and abstract sockets are not held"
    why = f" ({able.bwrap_reason})" if able.bwrap_reason else ""
    return f"Landlock {able.landlock} and a seccomp filter{why}: {gaps}"


def _has_own_tmpfs(facts: Facts) -> bool:
    """Whether bubblewrap gives the guest's memory a file system of its own."""
    wish = facts.confine.value
    return facts.capabilities.bwrap is not None and wish not in ("off", "landlock")


def check_user_namespaces(facts: Facts) -> Check:
    """User namespaces: for confinement and builds of an ordinary user."""
    if not facts.user_namespaces:
        return Check("user namespaces", Mark.OK, "allowed")
    if facts.root:
        reason = f"{facts.user_namespaces}; root confines and builds without them"
        return Check("user namespaces", Mark.OK, reason)
    return Check(
        "user namespaces",
        Mark.WARN,
        f"{facts.user_namespaces}: no bubblewrap, no image builds",
        "ask the administrator for `sysctl user.max_user_namespaces=15000` and, where it exists, "
        "`sysctl kernel.unprivileged_userns_clone=1`",
    )


def check_memory(facts: Facts) -> Check:
    """The memory asked for, against what the host or the control group has."""
    asked, room = int(facts.memory.value), facts.room
    text = (
        f"{format_size(asked)} asked for ({facts.memory.origin}); {room.limited_by} has "
        f"{format_size(room.total)}, {format_size(room.available)} free now"
    )
    if asked > room.total:
        return Check("memory", Mark.FAIL, text, "ask for less with --mem, or a larger allocation")
    if asked > room.available:
        return Check("memory", Mark.WARN, text, "ask for less with --mem, or end other programs")
    return Check("memory", Mark.OK, text)


def check_memory_place(facts: Facts) -> Check:
    """Where the file with the guest's memory lies, and whether it can lie there."""
    name = "memory place"
    if _has_own_tmpfs(facts):
        return Check(name, Mark.OK, "a private memory file system of each guest")
    path, warning = facts.memory_place
    remedy = "set TMPDIR to a memory file system that allows exec and has room, or use bubblewrap"
    if path is None:
        size = format_size(int(facts.memory.value))
        return Check(name, Mark.FAIL, f"none allows exec and has {size} free", remedy)
    if warning:
        return Check(name, Mark.WARN, warning, remedy)
    return Check(name, Mark.OK, path)


def check_shm(facts: Facts) -> Check:
    """/dev/shm: run directories lie there, and without bubblewrap a guest's memory."""
    if facts.shm is None:
        remedy = "mount a tmpfs there, or set XDG_RUNTIME_DIR"
        return Check("/dev/shm", Mark.WARN, "there is none that can be written to", remedy)
    how = "" if facts.shm.allows_exec else ", noexec (matters only without bubblewrap)"
    return Check("/dev/shm", Mark.OK, f"{facts.shm.kind}, {format_size(facts.shm.free)} free{how}")


def check_map_count(facts: Facts) -> Check:
    """vm.max_map_count, which bounds what a kernel without our patches can map."""
    count, asked = facts.capabilities.max_map_count, int(facts.memory.value)
    if facts.kernel is None or facts.kernel.tuned:
        return Check("vm.max_map_count", Mark.OK, f"{count}; the pot's kernel needs no more")
    reach = format_size(count * _PAGE)
    if asked <= count * _PAGE:
        return Check("vm.max_map_count", Mark.OK, f"{count}: enough for {reach} on this kernel")
    return Check(
        "vm.max_map_count",
        Mark.WARN,
        f"{count}: a guest process that touches more than {reach} in random order dies or hangs",
        f"{KERNEL_HINT} and has no such limit; or ask for "
        f"`sysctl vm.max_map_count={max(1 << 20, asked // _PAGE * 2)}`",
    )


def check_cpus(facts: Facts) -> Check:
    """The CPUs of the allocation; a one-CPU guest wants one for itself."""
    text = f"{len(facts.cpus)} in this allocation, {len(facts.free_cpus)} free of other guests"
    if not facts.free_cpus:
        remedy = "run fewer guests at once: one for each CPU is best"
        return Check("cpus", Mark.WARN, f"{text}: a further guest is not pinned, slower", remedy)
    return Check("cpus", Mark.OK, f"{text}: the next guest is pinned to one")


def check_network(facts: Facts) -> Check:
    """The network helper."""
    if facts.capabilities.slirp is None:
        reason = "slirp4netns is not installed: guests have no network"
        if facts.capabilities.qemu_user_network:
            reason = "slirp4netns is not installed: only guests of QEMU and KVM have a network"
        return Check("network", Mark.WARN, reason, "apt-get install slirp4netns")
    return Check("network", Mark.OK, f"outbound through {facts.capabilities.slirp}")


RUN_REMEDY = "set TMPDIR to a directory that you can write to (short, no odd characters)"


def check_run_directory(facts: Facts) -> Check:
    """Where a run keeps its private files."""
    place = facts.run_place
    if place is None:
        return Check("run directory", Mark.FAIL, "there is no place for it", RUN_REMEDY)
    text = f"in {place.path} ({place.kind}, {format_size(place.free)} free)"
    return Check("run directory", Mark.OK, text)


def check_store(facts: Facts) -> Check:
    """Room for images."""
    if facts.store is None:
        remedy = "set XDG_DATA_HOME to a directory that you can write to"
        return Check("store", Mark.WARN, "there is no place for images and pot", remedy)
    text = f"{facts.store.path}: {format_size(facts.store.free)} free"
    if facts.store.free < _LITTLE_ROOM:
        return Check("store", Mark.WARN, text, "make room, or set XDG_DATA_HOME to a larger disk")
    return Check("store", Mark.OK, text)


def check_images(facts: Facts) -> Check:
    """Images to start from."""
    if not facts.images:
        remedy = "`apppot image build debian-12` makes one; `apppot run host COMMAND` needs none"
        return Check("images", Mark.WARN, "none yet", remedy)
    return Check("images", Mark.OK, ", ".join(facts.images))


def check_tools(facts: Facts) -> list[Check]:
    """Tools for builds; what the pot has already needs no tools."""
    found = []
    for purpose, tools, remedy in facts.missing_tools:
        name = f"tools: {purpose}"
        if not tools:
            found.append(Check(name, Mark.OK, "all there"))
        elif purpose == KERNEL_WORKS and facts.kernel is not None and facts.kernel.tuned:
            reason = f"without {', '.join(tools)}; the pot has its kernel already"
            found.append(Check(name, Mark.OK, reason))
        else:
            found.append(Check(name, Mark.WARN, f"missing: {', '.join(tools)}", remedy))
    return found


CHECKS: tuple[Callable[[Facts], Check | None], ...] = (
    check_hypervisor,
    check_kernel,
    check_x86_kernel,
    check_qemu,
    check_calibration,
    check_runtime,
    check_confinement,
    check_user_namespaces,
    check_memory,
    check_memory_place,
    check_shm,
    check_map_count,
    check_cpus,
    check_network,
    check_run_directory,
    check_store,
    check_images,
)


def examine(facts: Facts) -> list[Check]:
    """All checks in the order in which they are shown."""
    found = [check(facts) for check in CHECKS]
    return [check for check in found if check is not None] + check_tools(facts)


def usable(checks: list[Check]) -> bool:
    """Whether a guest can run here."""
    return all(check.mark is not Mark.FAIL for check in checks)


def _split(problem: str) -> tuple[str, str]:
    """An error's text as (cause, remedy)."""
    cause, _, remedy = problem.partition("\n  remedy: ")
    return cause, remedy


# -- facts -----------------------------------------------------------------------------------
