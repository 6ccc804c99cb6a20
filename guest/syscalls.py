"""System calls that Python has no name for, and write(2) to the end.

Every function raises OSError with the call's name and argument; numbers and structures are
those of Linux on x86-64 (include/uapi).
"""

from __future__ import annotations

# The C module below `ctypes`, whose Python part takes the guest 5 ms more.
import _ctypes
import fcntl
import os
import select
import struct
import time

# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_BIND, MS_REC = 32, 1024, 4096, 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000

# reboot(2)
_RB_POWER_OFF = 0x4321FEDC
_RB_DISABLE_CAD = 0

_REBOOT_MAGIC = (0xFEE1DEAD, 672274793)

_SYS_SOCKET = 41
_SYS_PIVOT_ROOT = 155
_SYS_MOUNT = 165
_SYS_UMOUNT2 = 166
_SYS_REBOOT = 169
_SYS_INOTIFY_ADD_WATCH = 254
_SYS_UNSHARE = 272
_SYS_INOTIFY_INIT1 = 294
_SYS_SYNCFS = 306
_SYS_SETNS = 308
_SYS_FINIT_MODULE = 313
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_IDMAP = 0x00100000
_RESOLVE_IN_ROOT = 0x10
_O_CLOEXEC = 0o2000000
_IN_CREATE = 0x100

# include/uapi/linux/random.h
_RNDADDENTROPY, _RNDRESEEDCRNG = 0x40085203, 0x5207

_AF_INET, _SOCK_DGRAM = 2, 2
_SIOCADDRT, _SIOCSIFFLAGS, _SIOCSIFADDR = 0x890B, 0x8914, 0x8916
_SIOCSIFNETMASK, _SIOCSIFMTU = 0x891C, 0x8922
_IFF_UP, _RTF_UP, _RTF_GATEWAY = 1, 1, 2


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """A C long: what every system call takes and returns."""

    _type_ = "l"


class _Text(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """A C string, which lives as long as this object."""

    _type_ = "z"

    def address(self) -> int:
        """Where it lies in memory."""
        return int(struct.unpack("@P", bytes(self))[0])


class _Function(_ctypes.CFuncPtr):
    """A function of the C library that sets errno and returns a long."""

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


_syscall = _Function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "syscall"))  # type: ignore[arg-type]


def _call(what: str, number: int, *arguments: int | bytes | None) -> int:
    """System call `number`; integers go as longs, bytes as pointers, None as a null pointer."""
    words = [_Long(word) if isinstance(word, int) else word for word in arguments]
    return _check(_syscall(_Long(number), *words), what)


def _check(result: int, what: str) -> int:
    if result < 0:
        error = _ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def _bytes(value: str | bytes | None) -> bytes | None:
    return os.fsencode(value) if value is not None else None


def write_all(fd: int, data: bytes) -> None:
    """write(2), until all of `data` is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def mount(
    source: str | bytes,
    target: str | bytes,
    fstype: str | None,
    flags: int = 0,
    data: str | bytes | None = None,
) -> None:
    """mount(2)."""
    what = f"mount {fstype or 'bind'} {os.fsdecode(source)} on {os.fsdecode(target)}"
    paths = _bytes(source), _bytes(target), _bytes(fstype)
    _call(what, _SYS_MOUNT, *paths, flags, _bytes(data))


def umount(target: str | bytes, flags: int = 0) -> None:
    """umount2(2)."""
    _call(f"umount {os.fsdecode(target)}", _SYS_UMOUNT2, _bytes(target), flags)


def unshare(flags: int) -> None:
    """unshare(2)."""
    _call(f"unshare {flags:#x}", _SYS_UNSHARE, flags)


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _call("setns", _SYS_SETNS, fd, kind)


def sync_file_system(fd: int) -> None:
    """syncfs(2); an error is also one of a write since `fd` was opened."""
    _call("syncfs", _SYS_SYNCFS, fd)


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _call("pivot_root", _SYS_PIVOT_ROOT, _bytes(new_root), _bytes(put_old))


def open_in_root(root: int, path: bytes, flags: int) -> int:
    """openat2(2): open `path` as a process would whose root directory is `root`."""
    how = struct.pack("<QQQ", flags, 0, _RESOLVE_IN_ROOT)
    return _call(f"open {os.fsdecode(path)}", _SYS_OPENAT2, root, path, how, len(how))


def power_off() -> None:
    """reboot(2) with RB_POWER_OFF; returns only if the kernel refuses."""
    _call("power off", _SYS_REBOOT, *_REBOOT_MAGIC, _RB_POWER_OFF, 0)


def take_ctrl_alt_del() -> None:
    """Have Ctrl-Alt-Del send SIGINT to PID 1, instead of a reset."""
    _call("take Ctrl-Alt-Del", _SYS_REBOOT, *_REBOOT_MAGIC, _RB_DISABLE_CAD, 0)


def load_module(path: str) -> None:
    """finit_module(2) on an uncompressed module; one that is loaded already is fine."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call(f"load module {path}", _SYS_FINIT_MODULE, fd, b"", 0)
    except FileExistsError:
        pass
    finally:
        os.close(fd)


def idmap_mount(path: str, userns_fd: int) -> None:
    """Put an id-mapped clone of the mount at `path` over it (mount_setattr(2))."""
    flags = _OPEN_TREE_CLONE | _O_CLOEXEC
    tree = _call(f"open_tree {path}", _SYS_OPEN_TREE, _AT_FDCWD, _bytes(path), flags)
    try:
        attributes = struct.pack("<QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, userns_fd)
        size = len(attributes)
        _call(f"idmap {path}", _SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, attributes, size)
        place = (_AT_FDCWD, _bytes(path), _MOVE_MOUNT_F_EMPTY_PATH)
        _call(f"move_mount {path}", _SYS_MOVE_MOUNT, tree, b"", *place)
    finally:
        os.close(tree)


def wait_for_path(path: str, seconds: float) -> None:
    """Return once `path` exists, or after `seconds`."""
    if os.path.exists(path):
        return
    fd = _call("inotify_init1", _SYS_INOTIFY_INIT1, _O_CLOEXEC)
    try:
        folder = os.path.dirname(path)
        _call(f"watch {folder}", _SYS_INOTIFY_ADD_WATCH, fd, _bytes(folder), _IN_CREATE)
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not os.path.exists(path) and (left := deadline - time.monotonic()) > 0:
            if poll.poll(1000 * left):
                os.read(fd, 4096)
    finally:
        os.close(fd)


def reseed(entropy: bytes) -> None:
    """Mix `entropy` into the kernel's generator, credited in full, and renew it from that."""
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        pool = struct.pack("<ii", 8 * len(entropy), len(entropy)) + entropy
        fcntl.ioctl(fd, _RNDADDENTROPY, pool)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


class Interface:
    """A network interface, configured through the classic ioctls: no netlink, no `ip`."""

    def __init__(self, name: str) -> None:
        self._name = name.encode("ascii").ljust(16, b"\0")
        self._fd = _call("socket", _SYS_SOCKET, _AF_INET, _SOCK_DGRAM | _O_CLOEXEC, 0)

    def close(self) -> None:
        os.close(self._fd)

    def _ioctl(self, request: int, value: bytes) -> None:
        fcntl.ioctl(self._fd, request, (self._name + value).ljust(40, b"\0"))

    def up(self) -> None:
        """Set the interface up."""
        self._ioctl(_SIOCSIFFLAGS, struct.pack("<h", _IFF_UP))

    def address(self, address: str, prefix: int) -> None:
        """Give it an IPv4 address."""
        mask = (0xFFFFFFFF << (32 - prefix)) & 0xFFFFFFFF
        self._ioctl(_SIOCSIFADDR, _sockaddr(address))
        self._ioctl(_SIOCSIFNETMASK, _sockaddr(_dotted(mask)))

    def mtu(self, size: int) -> None:
        """Set the largest packet, in bytes."""
        self._ioctl(_SIOCSIFMTU, struct.pack("<i", size))

    def default_route(self, gateway: str) -> None:
        """Send what has no other way to `gateway`."""
        self.route("0.0.0.0", 0, gateway)

    def route(self, network: str, prefix: int, gateway: str) -> None:
        """Send what is for the network to `gateway`; 0.0.0.0: its machines are on this link."""
        mask = _dotted((0xFFFFFFFF << (32 - prefix)) & 0xFFFFFFFF)
        flags = _RTF_UP | (_RTF_GATEWAY if gateway != "0.0.0.0" else 0)
        device = _Text(self._name.rstrip(b"\0"))
        route = struct.pack(
            "<Q16s16s16sHh4xQQh6xQQQH6x",
            *(0, _sockaddr(network), _sockaddr(gateway), _sockaddr(mask)),
            *(flags, 0, 0, 0, 0, device.address(), 0, 0, 0),
        )
        fcntl.ioctl(self._fd, _SIOCADDRT, route)


def _sockaddr(address: str) -> bytes:
    octets = bytes([int(part) for part in address.split(".")])
    return struct.pack("<HH4s8x", _AF_INET, 0, octets)


def _dotted(value: int) -> str:
    return ".".join([str(value >> shift & 255) for shift in (24, 16, 8, 0)])
