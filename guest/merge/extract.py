"""A tar archive as changes: extracted over a base, so that overlayfs notes what became different.

By the rules of GNU tar's `--extract --listed-incremental`: where a directory of the archive has
a list of what was in it, the base's other entries go, directories that were renamed are moved,
and what the list only mentions (unchanged, or excluded) stays.  An archive without lists only
adds and replaces.  The archive is a stranger's: it is extracted inside a root of its own, which
holds nothing but the base and an empty layer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from apppot.guest import syscalls
from apppot.guest.merge import archive
from apppot.guest.merge.archive import Archive, Damaged, Member
from apppot.guest.merge.image import make_image, strip_generated
from apppot.guest.merge.overlay import Overlay, copy_attributes, strip_private
from apppot.guest.merge.root import IMAGE_ID, find
from apppot.guest.merge.scratch import POINT, REFRESHED
from apppot.guest.protocol.job import USER

_WORK = f"{POINT}/extracted"
_ROOT, _UPPER = f"{_WORK}/root", f"{_WORK}/upper"
# Where a guest of the original mounted something.  `tar --one-file-system` writes such a
# directory with an empty list, like one that was emptied.
_MOUNT_POINTS = re.compile(
    r"(proc|sys|dev|dev/(pts|shm|mqueue)|run|run/(lock|shm|user)|tmp|lib/init/rw|home/[^/]+/job)"
)
_XATTR = "SCHILY.xattr."
_XATTR_SPACES = ("user.", "security.", "system.posix_acl_", "trusted.")
_LARGEST_ID = 0xFFFFFFFE
_SPECIAL = {
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}
_SKIPPED = (b"V",)  # a volume's label


def convert(path: str, output: str, points: list[str], *, lists: bool) -> None:
    """Write what the archive at `path` makes of the layers at `points` as a changes file.

    Without `lists`, an incremental archive is an error.  Raises Damaged or OSError.
    """
    for folder in (_WORK, _ROOT, _UPPER, f"{_WORK}/work"):
        os.mkdir(folder)
    copy_attributes(points[-1], _UPPER)
    lower = ":".join(reversed(points))
    options = f"lowerdir={lower},upperdir={_UPPER},workdir={_WORK}/work"
    options += ",redirect_dir=off,metacopy=off"  # a layer must make sense over this base alone
    syscalls.mount("apppot", _ROOT, "overlay", syscalls.MS_NOATIME, options)
    with archive.opened(path) as source, _inside(_ROOT):
        Extraction(source, lists=lists).run()
    syscalls.umount(_ROOT)
    _leave_out_generated(points)
    strip_private(_UPPER)
    make_image(_UPPER, output)


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """With `folder` as this process's root: no name and no link leads out of it."""
    outside = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chroot(folder)
        os.chdir("/")
        yield
    finally:
        os.fchdir(outside)
        os.chroot(".")
        os.close(outside)


def _leave_out_generated(points: list[str]) -> None:
    """Take the agent's lines out of the account files; those that are the base's then go."""
    strip_generated(_UPPER, points)
    for path in REFRESHED:
        own, base = f"{_UPPER}/{path}", find(points, path)
        if base is None or not os.path.isfile(own) or os.path.islink(own):
            continue
        with open(own, "rb") as new, open(base, "rb") as old:
            if new.read() == old.read():
                os.unlink(own)


@dataclass
class _Attributes:
    """What a directory gets when all is in it."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    member: Member | None = None


class Extraction:
    """Extracts an archive into the current root."""

    def __init__(self, source: Archive, *, lists: bool = True) -> None:
        self._source = source
        self._lists_allowed = lists
        self._listed = False  # a directory with a list has come: GNU tar's stricter rules
        self._directories: dict[str, _Attributes] = {}
        self._moved: list[tuple[str, str]] = []
        self._unmoved: dict[str, str] = {}
        self._parent = ""

    def run(self) -> None:
        """Extract all of it; whatever is left of it after an error is of no use."""
        for member in self._source.members():
            if member.type not in _SKIPPED:
                self._one(member, _inner(member.name))
        for path in sorted(self._directories, reverse=True):
            self._finish(path, self._directories[path])

    def _one(self, member: Member, path: str) -> None:
        listing = self._source.listing(member)
        if listing is not None and not self._lists_allowed:
            raise Damaged("an incremental archive belongs to an image, and `host` is none")
        self._listed = self._listed or listing is not None
        if path:
            self._make_parent(path)
        if listing is not None or member.isdir():
            self._directory(member, path, listing)
        elif not path:
            raise Damaged("the archive's root is no directory")
        else:
            self._put(member, path)

    def _make_parent(self, path: str) -> None:
        """See that the directory of `path` is there.

        GNU tar's incremental archives have every directory before what is in it.  In others,
        links of the base lead on, as into /lib.
        """
        parent = os.path.dirname(path)
        if parent == self._parent:
            return
        place = ""
        for part in parent.split("/") if parent else ():
            place = f"{place}/{part}".lstrip("/")
            found = _lstat(place)
            if found is None and not self._listed:
                self._note(os.path.dirname(place))
                os.mkdir(place, 0o755)
                self._directories[place] = _Attributes(0o755, 0, 0, 0)
            elif found is None or not self._leads_on(place, found):
                raise Damaged(f"{path!a} lies below {place!a}, which is no directory")
        self._parent = parent
        self._note(parent)

    def _leads_on(self, place: str, found: os.stat_result) -> bool:
        return stat.S_ISDIR(found.st_mode) or (not self._listed and os.path.isdir(place))

    def _note(self, path: str) -> None:
        """Remember how a directory is that the archive may not have a member for."""
        if path not in self._directories:
            found = os.stat(path or "/")
            self._directories[path] = _Attributes(
                stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns
            )

    # -- directories -------------------------------------------------------------------------

    def _directory(self, member: Member, path: str, listing: list[tuple[str, str]] | None) -> None:
        found = _lstat(path)
        if found is not None and not stat.S_ISDIR(found.st_mode):
            if listing is None and os.path.isdir(path):
                return  # a link of the base, like /lib
            self._remove(path)
            found = None
        if listing is not None:
            if found is not None and not listing and _MOUNT_POINTS.fullmatch(path):
                return
            self._move_renamed(listing)
            found = _lstat(path)
        if found is None:
            self._check_moved(path, listing or [])
            os.mkdir(path, 0o700)
        elif listing is not None:
            self._purge(path, listing)
        mode, (uid, gid) = member.mode & 0o7777, _owner(member)
        self._directories[path] = _Attributes(mode, uid, gid, _exact(member, found), member)

    def _purge(self, path: str, listing: list[tuple[str, str]]) -> None:
        """Remove what the list does not have, or has as another kind of thing."""
        kinds = {name: kind for kind, name in listing if kind in "YND"}
        for name in sorted(os.listdir(f"/{path}")):
            place = f"{path}/{name}".lstrip("/")
            kind = kinds.get(name)
            is_directory = stat.S_ISDIR(os.lstat(place).st_mode)
            if kind is None or (kind == "D" and not is_directory) or (kind == "Y" and is_directory):
                self._remove(place)

    def _move_renamed(self, listing: list[tuple[str, str]]) -> None:
        """Do the renames of a list, in an order in which each finds its source.

        GNU tar writes down some in another order.
        """
        parking = ""
        left: list[tuple[str, str]] = []
        entries = [entry for entry in listing if entry[0] in "RTX"]
        for at, (kind, name) in enumerate(entries):
            if kind == "X":
                parking = f"{_inner(name)}/apppot-parking-{at}".lstrip("/")
            elif kind == "R":
                target = entries[at + 1] if at + 1 < len(entries) else ("", "")
                if target[0] != "T":
                    raise Damaged(f"the rename of {name!a} has no target")
                pair = _inner(name) or parking, _inner(target[1]) or parking
                if not all(pair):
                    raise Damaged(f"the rename of {name!a} leads nowhere")
                left.append(pair)
        while left:
            still = [pair for pair in left if not self._move(*pair)]
            if len(still) == len(left):
                break
            left = still
        # Such names were mounted, or met by chance: only what they were to bring can tell.
        self._unmoved.update({target: source for source, target in left})

    def _move(self, source: str, target: str) -> bool:
        """Move a directory; whether it was there."""
        for old, new in [("", ""), *self._moved]:
            place = source
            if old and source.startswith(f"{old}/"):
                place = new + source[len(old) :]
            if _is_directory(place):
                break
        else:
            return False
        if f"{target}/".startswith(f"{place}/"):
            raise Damaged(f"{place!a} cannot be moved into itself")
        self._make_way(target)
        for path in (place, target):
            self._note(os.path.dirname(path))
        self._remove(target)
        _move_tree(place, target)
        self._moved.append((source, target))
        return True

    def _make_way(self, path: str) -> None:
        """Make the parents of `path`, instead of what else has their names.

        A directory is renamed before the list of its new parent has come.
        """
        place = ""
        for part in path.split("/")[:-1]:
            place = f"{place}/{part}".lstrip("/")
            if not _is_directory(place):
                self._remove(place)
                os.mkdir(place, 0o755)

    def _check_moved(self, path: str, listing: list[tuple[str, str]]) -> None:
        """Raise Damaged where a directory's files were to come from one that is not there."""
        if path in self._unmoved and any(kind == "N" for kind, _ in listing):
            raise Damaged(
                f"{path!a} was {self._unmoved[path]!a}, which the image does not have: "
                "these changes belong to another one"
            )

    def _finish(self, path: str, wanted: _Attributes) -> None:
        """Give a directory its attributes, where it does not have them."""
        found = _lstat(path)
        if found is None or not stat.S_ISDIR(found.st_mode):
            return  # a link to it was followed, or a later member replaced it
        place = path or "/"
        if (found.st_uid, found.st_gid) != (wanted.uid, wanted.gid):
            os.chown(place, wanted.uid, wanted.gid)
        if stat.S_IMODE(os.lstat(place).st_mode) != wanted.mode:
            os.chmod(place, wanted.mode)
        if wanted.member is not None:
            _set_xattrs(place, wanted.member)
        if os.lstat(place).st_mtime_ns != wanted.mtime_ns:
            os.utime(place, ns=(wanted.mtime_ns, wanted.mtime_ns))

    # -- all else ----------------------------------------------------------------------------

    def _put(self, member: Member, path: str) -> None:
        if member.islnk():
            self._link(member, path)
            return
        self._remove(path)
        if member.issym():
            if not member.linkname or "\0" in member.linkname:
                raise Damaged(f"the symbolic link {path!a} leads nowhere")
            os.symlink(member.linkname, path)
        elif member.isreg():
            self._file(member, path)
        elif member.type in _SPECIAL:
            _make_device(member, path)
        else:
            raise Damaged(f"{path!a} is of a kind that is not known: {member.type!r}")
        uid, gid = _owner(member)
        os.chown(path, uid, gid, follow_symlinks=False)
        if not member.issym():
            os.chmod(path, member.mode & 0o7777)
        _set_xattrs(path, member)
        mtime, _ = archive.modified_ns(member)
        os.utime(path, ns=(mtime, mtime), follow_symlinks=False)

    def _file(self, member: Member, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        pieces = getattr(member, "sparse", None) or [(0, member.size)]
        with os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0) as file:
            done = 0
            for start, length in pieces:
                if length == 0:
                    continue  # GNU tar fills its table with those
                if start < done or length < 0 or start + length > member.size:
                    raise Damaged(f"the sparse file {path!a} is damaged")
                file.seek(start)
                for data in self._source.data(length):
                    syscalls.write_all(file.fileno(), data)
                done = start + length
            file.truncate(member.size)

    def _link(self, member: Member, path: str) -> None:
        target = _inner(member.linkname)
        found = _lstat(target) if target else None
        if found is None or stat.S_ISDIR(found.st_mode):
            raise Damaged(f"the hard link {path!a} is to {target!a}, which is no file")
        if target != path:
            if self._listed and not _is_directory(os.path.dirname(target)):
                raise Damaged(f"the hard link {path!a} is to {target!a}, beyond a link")
            self._remove(path)
            os.link(target, path, follow_symlinks=False)

    def _remove(self, path: str) -> None:
        found = _lstat(path)
        if found is None:
            return
        if not path:
            raise Damaged("the archive replaces its root")
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
            if f"{self._parent}/".startswith(f"{path}/"):
                self._parent = ""
        else:
            os.unlink(path)


def _inner(name: str) -> str:
    """A member's name relative to the root; "" is the root.  Raises Damaged for one outside."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name:
        raise Damaged(f"the name {name[:200]!a} leads out of the archive: this may be an attack")
    return "/".join(parts)


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path or "/")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_directory(path: str) -> bool:
    """Whether there is a directory at `path`, and no link on the way to it."""
    place = ""
    for part in path.split("/"):
        place = f"{place}/{part}".lstrip("/")
        found = _lstat(place)
        if found is None or not stat.S_ISDIR(found.st_mode):
            return False
    return True


def _owner(member: Member) -> tuple[int, int]:
    """The ids in the image: the account `user` had its caller's in the guest."""
    uid = IMAGE_ID if member.uname == USER else member.uid
    gid = IMAGE_ID if member.gname == USER else member.gid
    if not (0 <= uid <= _LARGEST_ID and 0 <= gid <= _LARGEST_ID):
        raise Damaged(f"{member.name!a} has impossible owners")
    return uid, gid


def _exact(member: Member, found: os.stat_result | None) -> int:
    """The member's time, with the base's nanoseconds where only those are unknown."""
    mtime, exact = archive.modified_ns(member)
    if not exact and found is not None and found.st_mtime_ns // 10**9 == mtime // 10**9:
        return found.st_mtime_ns
    return mtime


def _set_xattrs(path: str, member: Member) -> None:
    for key, value in member.pax_headers.items():
        name = key[len(_XATTR) :]
        if not key.startswith(_XATTR) or not name.startswith(_XATTR_SPACES):
            continue
        if name.startswith("trusted.overlay."):
            raise Damaged(f"{member.name!a} has attributes of an overlay")
        data = value.encode("utf-8", "surrogateescape")
        os.setxattr(path, name, data, follow_symlinks=False)


def _make_device(member: Member, path: str) -> None:
    if not (0 <= member.devmajor < 1 << 12 and 0 <= member.devminor < 1 << 20):
        raise Damaged(f"the device {path!a} has impossible numbers")
    if member.ischr() and member.devmajor == member.devminor == 0:
        raise Damaged(f"the device {path!a} has the numbers 0:0, which overlays use for removals")
    device = os.makedev(member.devmajor, member.devminor)
    os.mknod(path, _SPECIAL[member.type] | 0o600, device)


def _move_tree(source: str, target: str) -> None:
    """Rename a directory; one of the base, which overlayfs cannot rename, is copied."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        os.mkdir(target)
        Overlay(source, target).apply()
        shutil.rmtree(source)
