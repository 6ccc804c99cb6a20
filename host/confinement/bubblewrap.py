"""Confinement of the processes that run a guest: what they may see and touch of the host.

The guest is not trusted, nor is its kernel: the boundary is what the host allows to the
hypervisor's process.  Preferred is a mount namespace by bubblewrap; where that cannot work,
Landlock and a seccomp filter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from apppot.host.common.errors import HypervisorError

if TYPE_CHECKING:
    from apppot.host.capabilities.capabilities import Capabilities
    from apppot.host.hypervisor.launchplan import Shown

VIEW = "/view"
TEMPORARY = "/tmp"


WISHES = ("auto", "required", "bubblewrap", "landlock", "off")


class Confinement(StrEnum):
    """How a hypervisor's process is held."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    NONE = "none"


def choose(wish: str, capabilities: Capabilities) -> Confinement:
    """How to confine here, for a wish of `WISHES`; HypervisorError when it cannot be had."""
    if wish == "off":
        return Confinement.NONE
    if capabilities.bwrap is not None and wish != Confinement.LANDLOCK:
        return Confinement.BUBBLEWRAP
    if capabilities.landlock and wish != Confinement.BUBBLEWRAP:
        return Confinement.LANDLOCK
    if wish == "auto":
        return Confinement.NONE
    reason = "" if wish == Confinement.LANDLOCK else capabilities.bwrap_reason
    raise HypervisorError(
        f"--confine {wish}: {reason or 'the kernel of this host has no Landlock'}",
        "install bubblewrap and allow unprivileged user namespaces, or use a kernel with Landlock",
    )


@dataclass(frozen=True)
class Sandbox:
    """How to start one confined process: the words in front of its own, and its two places."""

    prefix: tuple[str, ...]
    view: str
    temporary: str
    # What the child itself does before its exec; with any, it also dies with the launcher.
    before_exec: tuple[Callable[[], object], ...] = ()


def bubblewrap(
    bwrap: str,
    shown: tuple[Shown, ...],
    *,
    memory: int,
    as_root: bool,
    host_network: bool = False,
    system: bool = False,
    libraries: tuple[str, ...] = (),
    devices: tuple[str, ...] = (),
) -> Sandbox:
    """The words that start a process which sees only `shown`, under VIEW.

    `memory` bytes of tmpfs hold the guest's memory file.  `system` adds the host's programs and
    libraries, `libraries` just the files that one program needs, `devices` device nodes.
    """
    words = [*_root_words()] if as_root else []
    words += [bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    words += ["--cap-drop", "ALL"] if as_root else ["--unshare-user"]
    if not host_network:
        words.append("--unshare-net")
    words += ["--die-with-parent", "--clearenv", "--setenv", "TMPDIR", TEMPORARY]
    words += ["--setenv", "HOME", TEMPORARY, "--setenv", "PATH", "/usr/bin:/bin"]
    words += ["--size", str(memory), "--tmpfs", TEMPORARY, "--proc", "/proc", "--dev", "/dev"]
    if system:
        words += _system_words()
    if libraries:
        words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for path in libraries:
        words += ["--ro-bind", path, path]
    for path in devices:
        words += ["--dev-bind", path, path]
    for item in shown:
        kind = "--bind" if item.writable else "--ro-bind"
        words += [kind, item.source, f"{VIEW}/{item.name}"]
        for path in item.masked:
            # A host without it has nothing to hide, and nowhere to mount.
            if os.path.isdir(os.path.join(item.source, path)):
                words += ["--tmpfs", f"{VIEW}/{item.name}/{path}"]
    words += ["--chdir", "/", "--"]
    return Sandbox(tuple(words), VIEW, TEMPORARY)


# What bubblewrap itself needs of a caller who is root.
_ROOT_NEEDS = "sys_admin setpcap net_admin setuid setgid sys_chroot dac_override"


def _root_words() -> list[str]:
    """Take from uid 0 that each exec gives it capabilities, keeping for bubblewrap what it needs.

    Otherwise the kernel sees "capabilities gained" at UML's exec of itself and clears
    ADDR_NO_RANDOMIZE, for which UML executes itself again, for ever.
    """
    kept = ",".join(f"+{name}" for name in _ROOT_NEEDS.split())
    bits = "--securebits=+noroot,+noroot_locked"
    return ["setpriv", bits, f"--inh-caps={kept}", f"--ambient-caps={kept}", "--"]


def _system_words() -> list[str]:
    words = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib64", "lib32"):
        if os.path.islink(f"/{name}"):
            words += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            words += ["--ro-bind", f"/{name}", f"/{name}"]
    for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/run/systemd/resolve"):
        words += ["--ro-bind-try", path, path]
    return words


# What UML and helpers read of the host beside what they are shown.
_HYPERVISOR_READS = ("/proc/cpuinfo", "/proc/self", "/dev/zero", "/dev/urandom")
_HYPERVISOR_WRITES = ("/dev/null",)
_SYSTEM_READS = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/run/systemd/resolve", "/dev/urandom")


def landlocked(
    shown: Iterable[Shown],
    view: str,
    temporary: str,
    *,
    system: bool = False,
    network: bool = False,
    libraries: tuple[str, ...] = (),
    devices: tuple[str, ...] = (),
) -> Sandbox:
    """Landlock and a seccomp filter: the process may use `shown` and `temporary` only.

    `system` adds the host's programs and libraries, `libraries` just the files that one program
    needs, `devices` device nodes; `network` is for a helper that needs the host's network, and
    has no filter.  A program of the host may change the metadata of what it is shown by name, as
    QEMU's file server does.  Raises OSError where the kernel has no Landlock.
    """
    from apppot.host.confinement import landlock

    items = list(shown)
    reads = [item.source for item in items if not item.writable and not item.masked]
    reads += [place for item in items if item.masked for place in _unmasked(item)]
    reads += [*_HYPERVISOR_READS, *(_SYSTEM_READS if system else ())]
    reads += ["/etc/ld.so.cache", *libraries] if libraries else []
    writes = [item.source for item in items if item.writable]
    rules = landlock.ruleset(
        [view, *filter(os.path.exists, reads)],
        [temporary, *_HYPERVISOR_WRITES, *devices, *writes],
        # QEMU opens the directory of a single file.
        listed={os.path.dirname(item.source) for item in items if system and "/" in item.name},
        network=network,
    )
    before = landlock.restrictions(rules, filtered=not network, metadata=system)
    return Sandbox((), view, temporary, tuple(before))


def _unmasked(item: Shown) -> list[str]:
    """What lies in a shown directory, without what is masked of it: Landlock can only add."""
    top = {path.split("/")[0] for path in item.masked}
    found = []
    for name in os.listdir(item.source):
        place = os.path.join(item.source, name)
        if name not in top:
            found.append(place)
        elif name not in item.masked:
            hidden = {path.split("/")[1] for path in item.masked if path.startswith(f"{name}/")}
            found += [os.path.join(place, part) for part in os.listdir(place) if part not in hidden]
    return found


def unconfined(view: str, temporary: str) -> Sandbox:
    """No confinement: the process sees what the user sees, and dies with the launcher."""
    return Sandbox((), view, temporary, (bool,))
