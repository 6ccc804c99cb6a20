"""What the agent generates for a guest: accounts, resolver, host name, sudo rule.

All of it lies in a layer of its own, above the images and below the writable one, so that it
never gets into saved changes.  Directories there repeat the attributes of the image's own.
"""

from __future__ import annotations

import os

from apppot.guest import shares, syscalls
from apppot.guest.init import network
from apppot.guest.merge.accounts import is_generated
from apppot.guest.merge.root import GENERATED, ROOT, SUPPLY, WORK, find
from apppot.guest.protocol.job import HOME, JOB_DIR, USER

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from apppot.guest.protocol.job import Job

SUDO_RULE = f"{USER} ALL=(ALL:ALL) NOPASSWD: ALL\n"

# Mount points that every guest has; name -> mode, where the image has none.
_DIRECTORIES = {"proc": 0o555, "sys": 0o555, "dev": 0o755, "run": 0o755, "tmp": 0o1777}


class Writer:
    """Writes generated files over the image layers mounted at `points` (base first)."""

    def __init__(self, points: list[str]) -> None:
        self.points = points

    def directory(self, path: str, mode: int = 0o755, owner: tuple[int, int] = (0, 0)) -> None:
        """Make `path` (relative) and its parents, like the image's where it has them."""
        parent = os.path.dirname(path)
        if parent:
            self.directory(parent)
        place = os.path.join(GENERATED, path)
        if os.path.isdir(place):
            return
        os.mkdir(place)
        image = find(self.points, path)
        if image is not None and os.path.isdir(image):
            copy_attributes(image, place)
        else:
            os.chmod(place, mode)
            os.chown(place, *owner)

    def hide(self, path: str) -> None:
        """Put an empty directory of root's at `path`, whatever the image has there."""
        self.directory(path)
        place = os.path.join(GENERATED, path)
        os.chown(place, 0, 0)
        os.chmod(place, 0o1777 if os.path.basename(path) == "tmp" else 0o755)
        os.setxattr(place, "trusted.overlay.opaque", b"y")

    def read(self, path: str) -> str:
        """The image's text at `path`; empty where it has none that can be read."""
        place = find(self.points, path)
        if place is None:
            return ""
        try:
            with open(place, encoding="utf-8", errors="surrogateescape") as text:
                return text.read()
        except OSError:
            return ""

    def write(self, path: str, text: str | bytes, mode: int = 0o644, group: int = 0) -> None:
        """Put a file of root's at `path`."""
        self.directory(os.path.dirname(path))
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(os.path.join(GENERATED, path), flags, mode)
        try:
            os.write(fd, data)
            os.fchmod(fd, mode)
            if group:
                os.fchown(fd, 0, group)
        finally:
            os.close(fd)


def copy_attributes(source: str, target: str) -> None:
    """Give the directory `target` the owner, mode and times of `source`."""
    found = os.stat(source)
    os.chown(target, found.st_uid, found.st_gid)
    os.chmod(target, found.st_mode & 0o7777)
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def passwd_text(text: str, uid: int, gid: int, shell: str) -> str:
    """An image's /etc/passwd with the account `user` in it, under the caller's ids.

    Its line comes before any other of the same uid, so that the uid's name is `user`.
    """
    lines = [line for line in text.splitlines() if line and not is_generated(line)]
    if not any(line.split(":")[0] == "root" for line in lines):
        lines.insert(0, "root:x:0:0:root:/root:/bin/sh")
    lines.insert(1, f"{USER}:x:{uid}:{gid}:{USER}:{HOME}:{shell}")
    return "\n".join(lines) + "\n"


def group_text(text: str, gid: int, groups: list[tuple[int, str]]) -> str:
    """An image's /etc/group with the caller's group and supplementary groups in it."""
    lines = [line for line in text.splitlines() if line and not is_generated(line)]
    if not any(line.split(":")[0] == "root" for line in lines):
        lines.insert(0, "root:x:0:")
    names = {line.split(":")[0] for line in lines}
    taken = {line.split(":")[2] for line in lines if line.count(":") >= 2}
    for number, name in [(gid, USER), *groups]:
        if str(number) in taken:
            continue
        free = name if name not in names else f"{USER}-{number}"
        lines.append(f"{free}:*:{number}:{USER}")
        names.add(free)
        taken.add(str(number))
    return "\n".join(lines) + "\n"


def shadow_text(text: str) -> str:
    """An image's /etc/shadow in which root and `user` exist, without a password that works."""
    lines = [line for line in text.splitlines() if line and not is_generated(line)]
    if not any(line.split(":")[0] == "root" for line in lines):
        lines.insert(0, "root:*:19000:0:99999:7:::")
    lines.append(f"{USER}:*:19000:0:99999:7:::")
    return "\n".join(lines) + "\n"


def generate(job: Job, points: list[str]) -> None:
    """Fill the generated layer for `job` over the image layers at `points`."""
    os.mkdir(GENERATED)
    writer = Writer(points)
    copy_attributes(points[-1], GENERATED)
    for name, mode in _DIRECTORIES.items():
        if find(points, name) is None:
            writer.directory(name, mode)
    for layer in job.layers:
        for path in layer.hidden:
            writer.hide(path)
    # Before all files: each has the same inode number in every guest, by which `apppot-snap`
    # knows a directory again.
    _directories(writer, job)
    _accounts(writer, job)
    _host_name(writer, job)
    if job.network is not None:
        writer.write("etc/resolv.conf", network.resolver(job.network))
    if job.localtime is not None:
        writer.write("etc/localtime", job.localtime)
    _sudo(writer, any(layer.fstype in shares.KINDS for layer in job.layers))


def _accounts(writer: Writer, job: Job) -> None:
    shell = "/bin/bash" if find(writer.points, "bin/bash") else "/bin/sh"
    # A caller who is root stays root; `user` keeps the ids that it has in images.
    uid, gid = (job.uid, job.gid) if job.uid else (1000, 1000)
    groups = [(number, name) for number, name in job.groups]
    writer.write("etc/passwd", passwd_text(writer.read("etc/passwd"), uid, gid, shell))
    group = group_text(writer.read("etc/group"), gid, groups)
    writer.write("etc/group", group)
    shadow_group = next((int(x.split(":")[2]) for x in group.splitlines() if x[:7] == "shadow:"), 0)
    writer.write("etc/shadow", shadow_text(writer.read("etc/shadow")), 0o640, shadow_group)


def _host_name(writer: Writer, job: Job) -> None:
    writer.write("etc/hostname", job.hostname + "\n")
    hosts = writer.read("etc/hosts") or "127.0.0.1\tlocalhost\n::1\tlocalhost\n"
    writer.write("etc/hosts", f"{hosts.rstrip()}\n127.0.1.1\t{job.hostname}\n")


def lend_machine_id() -> None:
    """Show a machine id where the merged root has none yet: one of this machine's own.

    As systemd does it where /etc cannot be written to: a file that is empty or says
    "uninitialized" asks for one, and it is bound over that, so that it is never saved.
    """
    place = f"{ROOT}/etc/machine-id"
    if os.path.islink(place) or not os.path.isfile(place):
        return
    with open(place, "rb") as file:
        if file.read(64).strip() not in (b"", b"uninitialized"):
            return
    number = bytearray(os.urandom(16))
    # As an UUID of version 4, RFC 9562.
    number[6], number[8] = number[6] & 0x0F | 0x40, number[8] & 0x3F | 0x80
    own = f"{WORK}/machine-id"
    with open(own, "wb") as file:
        file.write(number.hex().encode() + b"\n")
    os.chmod(own, 0o444)
    syscalls.mount(own, place, None, syscalls.MS_BIND)


def _sudo(writer: Writer, hosts_own: bool) -> None:
    if hosts_own:
        # In a user namespace the host's sudo does not belong to root.
        with open(f"{SUPPLY}/usr/bin/sudo", "rb") as program:
            writer.write("usr/bin/sudo", program.read(), 0o4755)
    writer.write("etc/sudoers.d/apppot", SUDO_RULE, 0o440)
    place = find(writer.points, "etc/sudoers")
    if place is None or not os.access(place, os.R_OK):
        text = "root ALL=(ALL:ALL) ALL\n@includedir /etc/sudoers.d\n"
        writer.write("etc/sudoers", text, 0o440)


def _directories(writer: Writer, job: Job) -> None:
    owner = (job.uid, job.gid) if job.uid else (1000, 1000)
    home = HOME.lstrip("/")
    writer.directory("etc/sudoers.d")
    writer.directory(home, 0o755, owner)
    if job.has_job_dir():
        writer.directory(JOB_DIR.lstrip("/"), 0o755, owner)
    for mount in job.mounts:
        _mount_point(writer, mount.target, bool(mount.name))


def _mount_point(writer: Writer, target: bytes, is_file: bool) -> None:
    path = os.fsdecode(target).lstrip("/")
    if find(writer.points, path) is not None:
        return
    if is_file:
        writer.write(path, b"")
    else:
        writer.directory(path)
