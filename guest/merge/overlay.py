"""Trees as overlayfs has them: whiteouts, opaque directories, attributes, copies."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator

OPAQUE = "trusted.overlay.opaque"
# What overlayfs notes for itself; it speaks of this machine's own layers.
_PRIVATE = ("trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.nlink")


def walk(tree: str) -> Iterator[str]:
    """Every path in `tree`, directories before what is in them, sorted."""
    with os.scandir(tree) as entries:
        found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    for entry in found:
        yield entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from walk(entry.path)


def strip_private(tree: str) -> None:
    """Take out what overlayfs noted for itself in the layer `tree`."""
    for path in walk(tree):
        for name in os.listxattr(path, follow_symlinks=False):
            if name in _PRIVATE:
                os.removexattr(path, name, follow_symlinks=False)


def is_whiteout(found: os.stat_result) -> bool:
    """Whether overlayfs reads this as "nothing here"."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def is_opaque(path: str) -> bool:
    """Whether overlayfs hides what lies below this directory."""
    with contextlib.suppress(OSError):
        return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
    return False


class Overlay:
    """Applies one tree of changes over another, by the rules of overlayfs."""

    def __init__(self, source: str, target: str) -> None:
        self.source, self.target = source, target
        self._links: dict[tuple[int, int], str] = {}

    def apply(self) -> None:
        for path in walk(self.source):
            self._one(path, os.path.join(self.target, os.path.relpath(path, self.source)))
        # Attributes of directories last: filling them changes their times.
        for path in sorted(walk(self.source), reverse=True):
            if os.path.isdir(path) and not os.path.islink(path):
                place = os.path.join(self.target, os.path.relpath(path, self.source))
                copy_attributes(path, place)
        copy_attributes(self.source, self.target)

    def _one(self, path: str, place: str) -> None:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            self._clear(place)
            self._copy(path, place, found)
            return
        below = os.lstat(place) if os.path.lexists(place) else None
        merges = below is not None and stat.S_ISDIR(below.st_mode) and not is_opaque(path)
        if merges:
            return
        hides = below is not None
        self._clear(place)
        os.mkdir(place)
        if hides or is_opaque(path):
            # It replaces something of a lower layer, perhaps a directory of the base.
            os.setxattr(place, OPAQUE, b"y")

    def _clear(self, place: str) -> None:
        if os.path.isdir(place) and not os.path.islink(place):
            shutil.rmtree(place)
        elif os.path.lexists(place):
            os.unlink(place)

    def _copy(self, path: str, place: str, found: os.stat_result) -> None:
        known = self._links.get((found.st_dev, found.st_ino))
        if known is not None:
            os.link(known, place, follow_symlinks=False)
            return
        if stat.S_ISREG(found.st_mode):
            copy_sparse(path, place)
        elif stat.S_ISLNK(found.st_mode):
            os.symlink(os.readlink(path), place)
        else:
            os.mknod(place, found.st_mode, found.st_rdev)
        copy_attributes(path, place)
        if found.st_nlink > 1:
            self._links[found.st_dev, found.st_ino] = place


def copy_sparse(source: str, target: str) -> None:
    """Copy contents; holes stay holes."""
    with open(source, "rb") as old, open(target, "wb") as new:
        end = os.fstat(old.fileno()).st_size
        at = 0
        while at < end:
            try:
                at = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole to the end
                break
            stop = os.lseek(old.fileno(), at, os.SEEK_HOLE)
            old.seek(at)
            new.seek(at)
            _copy_bytes(old.fileno(), new.fileno(), stop - at)
            at = stop
        new.truncate(end)


def _copy_bytes(source: int, target: int, count: int) -> None:
    os.lseek(target, os.lseek(source, 0, os.SEEK_CUR), os.SEEK_SET)
    while count > 0:
        done = os.sendfile(target, source, None, min(count, 1 << 24))
        if done == 0:
            raise OSError("a file became shorter while it was copied")
        count -= done


def xattrs(path: str) -> list[str]:
    """Names of the extended attributes; none where a base has no room for any."""
    try:
        return os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return []


def copy_attributes(source: str, target: str) -> None:
    """Owner, mode, extended attributes (capabilities and access lists among them) and times."""
    found = os.lstat(source)
    os.chown(target, found.st_uid, found.st_gid, follow_symlinks=False)
    for name in xattrs(source):
        if name not in _PRIVATE:
            value = os.getxattr(source, name, follow_symlinks=False)
            os.setxattr(target, name, value, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(target, stat.S_IMODE(found.st_mode))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)
