"""What this host allows, probed once and remembered for this boot of the host.

Callers ask for a capability, never for a version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from apppot.host.common.paths import cache_home
from apppot.host.pot.state import read_json, write_json

_VERSION = 5
QEMU = "qemu-system-x86_64"
# Red Hat's has another name, and is on nobody's PATH.
_QEMU_ELSEWHERE = "/usr/libexec/qemu-kvm"
# The directory's own free memory is what counts where one is shared with others.
MEMORY_PLACES = ("/dev/shm", "/run/shm", "/tmp")


@dataclass(frozen=True)
class Capabilities:
    """Probe results.  A path is None where the tool is missing; a reason says why not."""

    bwrap: str | None
    bwrap_reason: str
    landlock: int  # version of the interface, 0: none
    slirp: str | None
    max_map_count: int
    qemu: str | None = None
    qemu_version: tuple[int, ...] = ()
    qemu_machines: frozenset[str] = frozenset()  # of QEMU_MACHINES
    qemu_devices: frozenset[str] = frozenset()  # of QEMU_DEVICES
    qemu_user_network: bool = False
    virtiofsd: str | None = None  # one that serves who asks
    tsc_khz: int | None = None  # rate of the processor's time stamp counter; None: unknown


def probe(env: Mapping[str, str] = os.environ, *, fresh: bool = False) -> Capabilities:
    """This host's capabilities: from the cache of this boot, else probed and cached.

    `fresh` asks the host again: settings may have changed since it booted.
    """
    bwrap, slirp, qemu = map(shutil.which, ("bwrap", "slirp4netns", QEMU))
    qemu = qemu or shutil.which(_QEMU_ELSEWHERE)
    virtiofsd = next(filter(None, map(shutil.which, _VIRTIOFSD)), None)
    key = f"{boot_id()} {os.getuid()} {bwrap} {slirp} {qemu} {virtiofsd}"
    path = os.path.join(cache_home(env), f"capabilities-{_host_name()}.json")
    known = None if fresh else _cached(path, key)
    if known is None:
        from apppot.host.capabilities import tsc
        from apppot.host.confinement import landlock

        reason = _why_no_bubblewrap(bwrap)
        known = Capabilities(
            bwrap=None if reason else bwrap,
            bwrap_reason=reason,
            landlock=landlock.version(),
            slirp=slirp,
            max_map_count=_max_map_count(),
            qemu=qemu,
            qemu_version=_qemu_version(qemu),
            qemu_machines=_qemu_machines(qemu),
            qemu_devices=_qemu_devices(qemu),
            qemu_user_network=_has_user_network(qemu),
            virtiofsd=virtiofsd if _serves_us(virtiofsd) else None,
            tsc_khz=None if qemu is None else tsc.khz(),
        )
        _remember(path, key, known)
    return known


def _host_name() -> str:
    return os.uname().nodename  # a home directory is shared between hosts


def boot_id() -> str:
    """What names this boot of the host."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as text:
            return text.read().strip()
    except OSError:
        return "unknown"


def _cached(path: str, key: str) -> Capabilities | None:
    value = read_json(path, _VERSION) or {}
    if value.get("key") != key:
        return None
    try:
        found: Any = value["capabilities"]
        found["qemu_version"] = tuple(found["qemu_version"])
        for name in _SETS:
            found[name] = frozenset(found[name])
        return Capabilities(**found)
    except (KeyError, TypeError):
        return None


def _remember(path: str, key: str, capabilities: Capabilities) -> None:
    found = {
        **asdict(capabilities),
        **{name: sorted(getattr(capabilities, name)) for name in _SETS},
    }
    with suppress(OSError):  # a cache that cannot be written costs a probe each time
        write_json(path, {"version": _VERSION, "key": key, "capabilities": found})


def _why_no_bubblewrap(bwrap: str | None) -> str:
    """Empty where bubblewrap works as the launcher uses it."""
    if bwrap is None:
        return "bubblewrap is not installed"
    from apppot.host.confinement.bubblewrap import bubblewrap
    from apppot.host.process.run import ToolError, run

    sandbox = bubblewrap(bwrap, (), memory=1 << 20, as_root=os.getuid() == 0, system=True)
    try:
        run([*sandbox.prefix, "true"], timeout=20)
    except ToolError as error:
        return f"bubblewrap does not work here: {error.cause.splitlines()[-1].strip()}"
    return ""


# Kinds of machine, and devices that the launcher puts into them; builds of QEMU leave some out.
QEMU_MACHINES = ("microvm", "q35")
QEMU_DEVICES = (
    "virtserialport",
    *(
        f"{kind}-{bus}"
        for kind in ("virtio-blk", "virtio-serial", "virtio-net", "virtio-9p", "vhost-user-fs")
        for bus in ("device", "pci")
    ),
)
_SETS = ("qemu_machines", "qemu_devices")


def limited(able: Capabilities, machine: str, share: str) -> Capabilities:
    """`able` without what the settings `qemu_machine` and `qemu_share` rule out."""
    machines = able.qemu_machines if machine == "auto" else able.qemu_machines & {machine}
    devices = able.qemu_devices
    if share in ("virtiofs", "none"):
        devices = frozenset(name for name in devices if "-9p-" not in name)
    virtiofsd = able.virtiofsd if share in ("auto", "virtiofs") else None
    return replace(able, qemu_machines=machines, qemu_devices=devices, virtiofsd=virtiofsd)


def _qemu_version(program: str | None) -> tuple[int, ...]:
    """QEMU's version; empty where there is none, or it says none."""
    words = _said(program, "--version").split()
    number = words[words.index("version") + 1] if "version" in words[:-1] else ""
    return tuple(int(part) for part in number.split(".") if part.isdigit())


def _qemu_machines(program: str | None) -> frozenset[str]:
    names = {line.split()[0] for line in _said(program, "-M", "help").splitlines() if line.split()}
    return frozenset(name for name in QEMU_MACHINES if name in names)


def _qemu_devices(program: str | None) -> frozenset[str]:
    text = _said(program, "-device", "help")
    return frozenset(name for name in QEMU_DEVICES if f'name "{name}"' in text)


def _has_user_network(program: str | None) -> bool:
    """Whether `apppot.host.usernet` can be had of it: Red Hat's is without."""
    return {"user", "hubport", "dgram"} <= set(_said(program, "-netdev", "help").split())


# Where distributions put it; one of the same name that needs root may lie on the PATH.
_VIRTIOFSD = ("virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd")
# What the launcher asks of it: only newer ones can all of it (1.13).
_VIRTIOFSD_OPTIONS = ("--fd", "--readonly", "--allow-mmap", "--translate-uid", "--rlimit-nofile")


def _serves_us(program: str | None) -> bool:
    """Whether a virtiofsd can be ours: as root it insists on capabilities, which ours never has."""
    if os.getuid() == 0:
        return False
    text = _said(program, "--help")
    return all(option in text for option in _VIRTIOFSD_OPTIONS)


def _said(program: str | None, *words: str) -> str:
    from apppot.host.process.run import run

    if program is None:
        return ""
    return run([program, *words], check=False, timeout=20).stdout.decode(errors="replace")


def _max_map_count() -> int:
    try:
        with open("/proc/sys/vm/max_map_count", encoding="ascii") as text:
            return int(text.read())
    except (OSError, ValueError):
        return 65530


@dataclass(frozen=True)
class Memory:
    """Bytes of memory: of the host or of the control group that the caller is in."""

    total: int
    available: int
    limited_by: str
    huge: int = 0  # in free huge pages
    huge_page: int = 1  # bytes of one


def memory() -> Memory:
    """What a guest could have at most, and what is free now."""
    with open("/proc/meminfo", encoding="ascii") as text:
        table = {line.split(":")[0]: int(line.split()[1]) << 10 for line in text}
    huge_page = table.get("Hugepagesize", 0) or 1
    huge = (table.get("HugePages_Free", 0) >> 10) * huge_page  # a number of pages, not of KB
    total = table["MemTotal"] + table.get("SwapTotal", 0)
    available = table.get("MemAvailable", table["MemFree"]) + table.get("SwapFree", 0)
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        return Memory(limit, min(available, limit), "the control group", huge, huge_page)
    return Memory(total, available, "the host", huge, huge_page)


def _cgroup_limit() -> int | None:
    """The smallest memory limit on the caller's path of control groups (v1 or v2)."""
    limits = []
    try:
        with open("/proc/self/cgroup", encoding="ascii", errors="replace") as text:
            rows = [line.rstrip("\n").split(":", 2) for line in text]
    except OSError:
        return None
    for _, controllers, path in rows:
        if controllers == "":
            base, name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        while True:
            limits.append(_read_limit(f"{base}{path.rstrip('/')}/{name}"))
            if path in ("/", ""):
                break
            path = os.path.dirname(path)
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _read_limit(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as text:
            word = text.read().strip()
    except OSError:
        return None
    return int(word) if word.isdigit() and int(word) < 1 << 60 else None


def memory_place(need: int, env: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """Where an unconfined guest's memory file may lie, and what to warn of.

    A memory file system that allows exec and has `need` bytes free; else a disk, with a
    warning; None where nothing serves.
    """
    places = [*MEMORY_PLACES[:2], env.get("XDG_RUNTIME_DIR", ""), env.get("TMPDIR", ""), "/tmp"]
    usable = [place for place in places if place and _serves(place, need)]
    in_memory = [place for place in usable if file_system(place) == "tmpfs"]
    if in_memory:
        return in_memory[0], ""
    if usable:
        return usable[0], f"the guest's memory lies on a disk ({usable[0]}): it will be slow"
    return None, "no place for the guest's memory"


def _serves(place: str, need: int) -> bool:
    try:
        stat = os.statvfs(place)
    except OSError:
        return False
    allows_exec = not stat.f_flag & os.ST_NOEXEC
    return allows_exec and os.access(place, os.W_OK) and stat.f_bavail * stat.f_frsize >= need


def file_system(place: str) -> str:
    """The kind of file system that `place` lies on; "unknown" where the mounts do not say."""
    real, best, kind = os.path.realpath(place), "", "unknown"
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            _, point, fstype = line.split()[:3]
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, fstype
    return kind
