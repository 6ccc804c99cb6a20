"""The merged root: base image, changes and a writable layer under one tree.

Nothing is unpacked: layers are mounted and stacked with overlayfs, so that merging takes as
long for 10 GB as for 1 MB.
"""

from __future__ import annotations

import fcntl
import os
import struct

from apppot.guest import shares, syscalls
from apppot.guest.console import log

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    from apppot.guest.protocol.job import Layer

WORK = "/run/apppot"
ROOT = WORK + "/root"
GENERATED = WORK + "/generated"
SUPPLY = "/usr/share/apppot/supply"

# The account `user` in images; in the guest it has the caller's ids.
IMAGE_ID = 1000

_MODULES = ("overlay", "squashfs", "erofs")

# File system, place and bytes of what tells it apart.
_MAGICS = (
    ("squashfs", 0, b"hsqs"),
    ("erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    ("ext4", 1080, b"\x53\xef"),
)

# include/uapi/linux/loop.h
_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4
# struct loop_config: descriptor, block size, loop_info64 (offset, size limit, flags and what
# stays zero), reserved.
_LOOP_CONFIG = struct.Struct("=II24xQQ8xI160x16x64x")


def ensure_file_systems(modules: str | None, loop: bool = False) -> None:
    """Load what a stock kernel has as modules from `modules`, a tree of *.ko with modules.dep.

    `loop` asks for the loop device besides.
    """
    if modules is None:
        return
    with open("/proc/filesystems", encoding="ascii") as table:
        known = {line.split()[-1] for line in table}
    missing = [name for name in _MODULES if name not in known]
    if loop and not os.path.exists("/dev/loop-control"):
        missing.append("loop")
    if not missing:
        return
    needs = _dependencies(modules)
    for name in missing:
        path = next((path for path in needs if path.endswith(f"/{name}.ko")), None)
        for item in [*reversed(needs[path]), path] if path else []:
            syscalls.load_module(os.path.join(modules, item))


def _dependencies(modules: str) -> dict[str, list[str]]:
    """modules.dep as module path -> paths it needs, nearest first."""
    needs = {}
    with open(os.path.join(modules, "modules.dep"), encoding="ascii") as lines:
        for line in lines:
            path, _, rest = line.partition(":")
            needs[path] = rest.split()
    return needs


def mount_layers(layers: list[Layer]) -> list[str]:
    """Mount each layer under the work directory; returns the mount points, base first."""
    points = []
    for number, layer in enumerate(layers):
        point = f"{WORK}/layer{number}"
        os.mkdir(point)
        _mount_layer(layer, point)
        points.append(point)
    return points


def _mount_layer(layer: Layer, point: str) -> None:
    flags = syscalls.MS_NOATIME if layer.writable else syscalls.MS_NOATIME | syscalls.MS_RDONLY
    if layer.fstype == "bind":
        syscalls.mount(layer.source, point, None, syscalls.MS_BIND)
        return
    if layer.fstype in shares.KINDS:
        shares.mount(layer.fstype, layer.source, point, flags)
        return
    source, fstype = layer.source, layer.fstype
    if fstype == "file":
        source, fstype = _host_file(source, point)
    if layer.offset:
        source = loop_device(source, layer.offset, not layer.writable)
    # A journal of an ext file system that was not unmounted cannot be replayed read-only.
    data = "noload" if fstype == "ext4" and not layer.writable else None
    syscalls.mount(source, point, fstype, flags, data)


def _host_file(path: bytes, point: str) -> tuple[bytes, str]:
    """A block device that shows an image file of the host (through hostfs), and its format."""
    folder = f"{point}.host"
    os.mkdir(folder)
    syscalls.mount("hostfs", folder, "hostfs", syscalls.MS_RDONLY, os.path.dirname(path))
    file = os.fsencode(folder) + b"/" + os.path.basename(path)
    with open(file, "rb") as image:
        head = image.read(2048)
    for fstype, start, magic in _MAGICS:
        if head[start : start + len(magic)] == magic:
            return loop_device(file, 0, True), fstype
    raise OSError(f"{os.fsdecode(path)} is no file system: make one of it, apppot image import")


def loop_device(source: bytes, offset: int, read_only: bool) -> bytes:
    """A block device that shows the file or device `source` from byte `offset` to its end.

    It frees itself when what is mounted from it is unmounted.
    """
    access = os.O_RDONLY if read_only else os.O_RDWR
    backing = os.open(source, access | os.O_CLOEXEC)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        path = b"/dev/loop%d" % fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if read_only else 0)
        device = os.open(path, access | os.O_CLOEXEC)
        fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, 0, offset, 0, flags))
        # Not closed: the last close before the mount would free it.  Nothing executes this
        # process again, and the payload's exec closes its copy.
        return path
    finally:
        os.close(control)
        os.close(backing)


def map_owner(points: list[str], uid: int, gid: int) -> None:
    """Show the files of the images' account `user` as the caller's in the mounts at `points`.

    A kernel that cannot (squashfs before Linux 6.2) is no reason to fail: the log says so.
    """
    if (uid, gid) == (IMAGE_ID, IMAGE_ID):
        return
    try:
        userns = _user_namespace(_swap(IMAGE_ID, uid), _swap(IMAGE_ID, gid))
    except OSError as error:
        log(f"files of `user` in images keep uid {IMAGE_ID}: {error}")
        return
    try:
        for point in points:
            _map_mount(point, userns)
    finally:
        os.close(userns)


def _map_mount(point: str, userns: int) -> None:
    try:
        syscalls.idmap_mount(point, userns)
    except OSError as error:
        log(f"files of `user` in {point} keep uid {IMAGE_ID}: {error}")


def _swap(one: int, other: int) -> bytes:
    """A map of all ids to themselves, with two exchanged, in the form of /proc/PID/uid_map."""
    last = 0xFFFFFFFE
    if one == other:
        return b"0 0 %d" % last
    low, high = min(one, other), max(one, other)
    lines = [(0, 0, low), (low, high, 1), (low + 1, low + 1, high - low - 1)]
    lines += [(high, low, 1), (high + 1, high + 1, last - high - 1)]
    return b"\n".join([b"%d %d %d" % line for line in lines if line[2] > 0])


def _user_namespace(uid_map: bytes, gid_map: bytes) -> int:
    """A descriptor of a user namespace with these maps; it lives as long as the descriptor."""
    ready_read, ready_write = os.pipe()
    hold_read, hold_write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(hold_write)
            syscalls.unshare(syscalls.CLONE_NEWUSER)
            os.write(ready_write, b".")
            os.read(hold_read, 1)
        finally:
            os._exit(0)
    os.close(ready_write)
    os.close(hold_read)
    try:
        if not os.read(ready_read, 1):
            raise OSError("the user namespace for the id-mapped mounts could not be made")
        for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
            with open(f"/proc/{child}/{name}", "wb", buffering=0) as table:
                table.write(text)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(hold_write)
        os.close(ready_read)
        os.waitpid(child, 0)


def find(points: list[str], path: str) -> str | None:
    """Where `path` (relative) shows in layers mounted at `points`, base first; None if it does not.

    Follows symbolic links inside the layers.  A whiteout hides what lies below it.
    """
    for _ in range(40):
        place, link = _step(points, path)
        if link is None:
            return place
        path = link
    return None


def _step(points: list[str], path: str) -> tuple[str | None, str | None]:
    """(place, None) when resolved, (None, path to try instead) at a symbolic link."""
    parts = [part for part in path.split("/") if part]
    for depth in range(1, len(parts) + 1):
        prefix = "/".join(parts[:depth])
        place = _topmost(points, prefix)
        if place is None:
            return None, None
        if os.path.islink(place):
            target = os.readlink(place)
            parent = "/" if target.startswith("/") else "/" + "/".join(parts[: depth - 1])
            joined = os.path.normpath(os.path.join(parent, target, *parts[depth:]))
            return None, joined.lstrip("/")
        if depth == len(parts):
            return place, None
    return None, None


def _topmost(points: list[str], path: str) -> str | None:
    for point in reversed(points):
        place = os.path.join(point, path)
        try:
            found = os.lstat(place)
        except OSError:
            continue
        whiteout = found.st_mode & 0o170000 == 0o020000 and found.st_rdev == 0
        return None if whiteout else place
    return None


def merge(points: list[str], scratch: str) -> None:
    """Stack the layers at `points` (base first) under the writable `scratch` at ROOT."""
    lower = [GENERATED, *reversed(points)]
    if os.path.isdir(SUPPLY):
        lower.append(SUPPLY)
    options = f"lowerdir={':'.join(lower)},upperdir={scratch}/upper,workdir={scratch}/work"
    # Directories keep their inode numbers from one guest to the next.
    options += ",xino=on"
    os.mkdir(ROOT)
    syscalls.mount("apppot", ROOT, "overlay", syscalls.MS_NOATIME, options)


def use_in_place(point: str) -> None:
    """Make the writable image mounted at `point` the root itself, without a layer over it."""
    os.mkdir(ROOT)
    syscalls.mount(point, ROOT, None, syscalls.MS_BIND)


def release(points: list[str]) -> None:
    """Write everything to the disks that are written to, and leave their file systems clean.

    Call it when no payload runs any more.
    """
    os.sync()
    _attempt(syscalls.umount, ROOT, syscalls.MNT_DETACH)
    for point in [*reversed(points), "/"]:
        if not os.statvfs(point).f_flag & os.ST_RDONLY:
            flags = syscalls.MS_REMOUNT | syscalls.MS_RDONLY
            _attempt(syscalls.mount, "none", point, None, flags)
    os.sync()


def _attempt(call: Callable[..., None], *arguments: object) -> None:
    try:
        call(*arguments)
    except OSError as error:
        log(f"{error}")
