"""Confinement of the processes that run a guest: what they may see and touch of the host.

The guest is not trusted, nor is its kernel: the boundary is what the host allows to the
hypervisor's process.  Preferred is a mount namespace by bubblewrap; where that cannot work,
Landlock and a seccomp filter.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from apppot.host.confinement.sandbox import TEMPORARY, VIEW, Sandbox

if TYPE_CHECKING:
    from apppot.host.confinement.sandbox import Shown


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
