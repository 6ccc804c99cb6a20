"""Confinement where bubblewrap cannot work: Landlock, and a seccomp filter for what it omits.

Landlock judges open(), but neither chmod, chown, utime, setxattr nor sockets; the filter answers
EPERM to those (hostfs then works through descriptors, which Landlock has judged).  Both are
inherited and cannot be undone.  Numbers are those of Linux on x86-64 (include/uapi).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from apppot.host.confinement.sandbox import Sandbox

if TYPE_CHECKING:
    from apppot.host.confinement.sandbox import Shown


_SYS_SECCOMP = 317
_SYS_CREATE_RULESET, _SYS_ADD_RULE, _SYS_RESTRICT_SELF = 444, 445, 446
_PR_SET_NO_NEW_PRIVS = 38
_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_SCOPE_ABSTRACT_UNIX, _SCOPE_SIGNAL = 1, 2
_NET_BIND_TCP, _NET_CONNECT_TCP = 1, 2

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
# Number of file system rights by version of the interface; later versions add none of these.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_RIGHTS_NOW = 16
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """The kernel's version of Landlock; 0 where it has none."""
    return max(0, int(_libc.syscall(_SYS_CREATE_RULESET, None, 0, _RULESET_VERSION)))


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def ruleset(
    readable: Iterable[str],
    writable: Iterable[str],
    *,
    listed: Iterable[str] = (),
    network: bool = False,
) -> int:
    """A descriptor of the rules: what lies below these paths, and nothing else of the host.

    Of `listed` only the names of what lies below.  `network` leaves TCP to the process.  Raises
    OSError where Landlock is missing.
    """
    abi = version()
    handled = (1 << _RIGHTS.get(abi, _RIGHTS_NOW)) - 1
    net = _NET_BIND_TCP | _NET_CONNECT_TCP if abi >= 4 and not network else 0
    scoped = _SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL if abi >= 6 else 0
    known = 24 if abi >= 6 else 16 if abi >= 4 else 8  # bytes that this version reads
    attributes = struct.pack("<QQQ", handled, net, scoped)[:known]
    size = ctypes.c_size_t(len(attributes))
    rules = _checked(_libc.syscall(_SYS_CREATE_RULESET, attributes, size, 0), "Landlock")
    for path in readable:
        _allow(rules, path, _READ & handled)
    for path in writable:
        _allow(rules, path, handled)
    for path in listed:
        _allow(rules, path, _READ_DIR)
    return rules


def _allow(rules: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):
            rights &= _ON_FILES
        rule = struct.pack("<Qi", rights, fd)
        result = _libc.syscall(_SYS_ADD_RULE, rules, _RULE_PATH_BENEATH, rule, 0)
        _checked(result, f"Landlock rule for {path}")
    finally:
        os.close(fd)


def restrictions(
    rules: int, *, filtered: bool, metadata: bool = False
) -> list[Callable[[], object]]:
    """What a child calls before its exec to be held by `rules`, and by the filter if asked.

    `metadata` leaves it the calls that change metadata by name.
    """
    program = _filter_program(metadata) if filtered else b""

    def restrict() -> None:
        _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        _checked(_libc.syscall(_SYS_RESTRICT_SELF, rules, 0), "Landlock")

    def install_filter() -> None:
        buffer = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("<H6xQ", len(program) // 8, ctypes.addressof(buffer))
        _checked(_libc.syscall(_SYS_SECCOMP, 1, 0, header), "seccomp filter")

    return [restrict, install_filter] if filtered else [restrict]


_IO_URING_SETUP = 425
# Calls that change metadata by name, and io_uring, which would do all of this unseen.
_REFUSED = {
    "chmod": 90,
    "chown": 92,
    "lchown": 94,
    "utime": 132,
    "setxattr": 188,
    "lsetxattr": 189,
    "removexattr": 197,
    "lremovexattr": 198,
    "utimes": 235,
    "fchownat": 260,
    "futimesat": 261,
    "fchmodat": 268,
    "io_uring_setup": _IO_URING_SETUP,
    "fchmodat2": 452,
    "setxattrat": 463,
    "removexattrat": 466,
}
_SOCKET, _UTIMENSAT = 41, 280
_AF_UNIX = 1
_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_ALLOW, _EPERM = 0x7FFF0000, 0x00050000 | 1

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
# Offsets in struct seccomp_data: number, architecture, low and high words of the arguments.
_NUMBER, _ARCH, _ARG0, _ARG1_LOW, _ARG1_HIGH = 0, 4, 16, 24, 28


def _filter_program(metadata: bool) -> bytes:
    """The filter in classic BPF; `metadata` as in `restrictions`."""
    numbers = [_IO_URING_SETUP] if metadata else sorted(_REFUSED.values())
    refuse = 12 + len(numbers)  # index of the instruction that refuses; the one before allows

    def jump(index: int, code: int, value: int, yes: int | None, no: int | None) -> bytes:
        def distance(target: int | None) -> int:
            return 0 if target is None else target - index - 1

        return struct.pack("<HBBI", code, distance(yes), distance(no), value)

    def load(offset: int) -> bytes:
        return struct.pack("<HBBI", _LOAD, 0, 0, offset)

    allow = refuse - 1
    program = [
        load(_ARCH),
        jump(1, _IF_EQUAL, _AUDIT_ARCH_X86_64, None, refuse),
        load(_NUMBER),
        jump(3, _IF_AT_LEAST, _X32_BIT, refuse, None),
    ]
    program += [jump(4 + n, _IF_EQUAL, number, refuse, None) for n, number in enumerate(numbers)]
    at = len(program)
    program += [
        jump(at, _IF_EQUAL, _SOCKET, at + 5, None),
        jump(at + 1, _IF_EQUAL, _UTIMENSAT, allow if metadata else None, allow),
        # Without a name it changes a descriptor.
        load(_ARG1_LOW),
        jump(at + 3, _IF_EQUAL, 0, None, refuse),
        jump(at + 4, _IF_AT_LEAST, 0, allow, None),
        load(_ARG0),
        jump(at + 6, _IF_EQUAL, _AF_UNIX, allow, refuse),
        struct.pack("<HBBI", _RETURN, 0, 0, _ALLOW),
        struct.pack("<HBBI", _RETURN, 0, 0, _EPERM),
    ]
    assert len(program) == refuse + 1
    return b"".join(program)


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
