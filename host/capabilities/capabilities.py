"""What this host allows, probed once and remembered for this boot of the host.

Callers ask for a capability, never for a version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from apppot.host.common.files import read_json, write_json
from apppot.host.common.frozen import frozen
from apppot.host.common.host import boot_id, host_name
from apppot.host.common.paths import cache_home

_VERSION = 5
QEMU = "qemu-system-x86_64"
# Red Hat's has another name, and is on nobody's PATH.
_QEMU_ELSEWHERE = "/usr/libexec/qemu-kvm"


@frozen
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
    path = os.path.join(cache_home(env), f"capabilities-{host_name()}.json")
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
        write_json(path, {"key": key, "capabilities": found}, version=_VERSION)


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
