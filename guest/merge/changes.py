"""Saving, listing and joining changes, inside a guest.

The pot's own program, run by the launcher as a job in the pot's root (`Job.in_pot`), where the
layers are mounted below the work directory:

    changes.py save OUTPUT        the writable layer as a changes file
    changes.py list LAYER         what is in a layer, as JSON lines on stdout
    changes.py join OUTPUT N M…   several layers of changes as one, the last on top
    changes.py commit OUTPUT [session]
                                  base and changes, with the writable layer, as a new base
    changes.py convert OUTPUT ARCHIVE [plain]
                                  a tar, GNU tar's incremental ones too, as a changes file

Written as EROFS: it keeps nanoseconds, access control lists, extended attributes, hard links and
device nodes, whiteouts among them, and is mounted as it is.  Off the boot path: imports freely.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator

from apppot.guest import syscalls, tools
from apppot.guest.init.account import without_generated
from apppot.guest.merge.root import WORK, find
from apppot.guest.merge.scratch import POINT, REFRESHED, UPPER, rewrite

OPAQUE = "trusted.overlay.opaque"
# What overlayfs notes for itself; it speaks of this machine's own layers.
_PRIVATE = ("trusted.overlay.origin", "trusted.overlay.impure", "trusted.overlay.nlink")
_MKFS_ENV = {
    # The file system's own date, which no file may be younger than.  -1 would mean "now".
    "SOURCE_DATE_EPOCH": str((1 << 64) - 2),
    # It fails where a layer knows no extended attributes.
    "LD_PRELOAD": "/usr/lib/llistxattr.so",
}
_BEST_COMPRESSION = 1024  # four times what LZ4 reaches with zeros
_LONGEST_NAME = 254  # one less than file systems allow
_JOB_ROOT = WORK + "/root/home/user/job"


def layers() -> list[str]:
    """The mount points of the layers, base first."""
    numbers = sorted(int(name[5:]) for name in os.listdir(WORK) if name[5:].isdigit())
    return [f"{WORK}/layer{number}" for number in numbers]


def make_image(tree: str, output: str) -> None:
    """Write `tree` as an EROFS image: the same bytes for the same tree."""
    check_names(os.fsencode(tree))
    uuid = "00000000-0000-4000-8000-617070706f74"
    options = ["--quiet", "-zlz4", "--preserve-mtime", "-x1", f"-U{uuid}"]
    try:
        tools.run("/usr/bin/mkfs.erofs", *options, output, tree, **_MKFS_ENV)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(output)
        raise


def check_names(tree: bytes) -> None:
    """Raise OSError where a name is too long for mkfs.erofs 1.5, which would cut it silently."""
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            if len(name) > _LONGEST_NAME:
                place = os.path.relpath(os.path.join(folder, name), tree)
                text = place.decode(errors="replace")
                raise OSError(f"a name has more than {_LONGEST_NAME} bytes: {text!r}")


# -- save ------------------------------------------------------------------------------------


def save(output: str) -> None:
    """Write the writable layer without what the agent generated."""
    strip_generated(UPPER, layers())
    strip_private(UPPER)
    make_image(UPPER, output)


def strip_generated(upper: str, points: list[str]) -> None:
    """Take the caller's account lines out of the session's own account files.

    The next run puts its caller's in again.
    """
    # With them the copies that account tools leave behind.
    for path in [*REFRESHED, *(f"{path}-" for path in REFRESHED)]:
        own = f"{upper}/{path}"
        if not os.path.isfile(own) or os.path.islink(own):
            continue
        base = find(points, path)
        with open(own, encoding="utf-8", errors="surrogateescape") as text:
            now = text.read()
        before = ""
        if base is not None:
            with open(base, encoding="utf-8", errors="surrogateescape") as text:
                before = text.read()
        cleaned = f"{POINT}/cleaned"
        with open(cleaned, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(without_generated(now, before))
        rewrite(own, cleaned)
        os.unlink(cleaned)


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


# -- list ------------------------------------------------------------------------------------


def is_whiteout(found: os.stat_result) -> bool:
    """Whether overlayfs reads this as "nothing here"."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def is_opaque(path: str) -> bool:
    """Whether overlayfs hides what lies below this directory."""
    with contextlib.suppress(OSError):
        return os.getxattr(path, OPAQUE, follow_symlinks=False) == b"y"
    return False


def describe(path: str, tree: str) -> dict[str, object]:
    """One entry for `list`; names that are not UTF-8 come with surrogates."""
    found = os.lstat(path)
    entry: dict[str, object] = {
        "path": os.path.relpath(path, tree),
        "type": _kind(path, found),
        "mode": stat.S_IMODE(found.st_mode),
        "uid": found.st_uid,
        "gid": found.st_gid,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
    }
    if stat.S_ISLNK(found.st_mode):
        entry["target"] = os.readlink(path)
    elif stat.S_ISREG(found.st_mode):
        entry["links"] = found.st_nlink
    elif stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        entry["device"] = [os.major(found.st_rdev), os.minor(found.st_rdev)]
    names = [name for name in os.listxattr(path, follow_symlinks=False) if name != OPAQUE]
    if names:
        values = {n: os.getxattr(path, n, follow_symlinks=False).hex() for n in sorted(names)}
        entry["xattrs"] = values
    return entry


def _kind(path: str, found: os.stat_result) -> str:
    if is_whiteout(found):
        return "deleted"
    if stat.S_ISDIR(found.st_mode):
        return "replaced directory" if is_opaque(path) else "directory"
    kinds = {stat.S_IFREG: "file", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo"}
    kinds |= {stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds[stat.S_IFMT(found.st_mode)]


def print_list(tree: str) -> None:
    """What is in the layer at `tree`, a JSON object a line."""
    for path in walk(tree):
        print(json.dumps(describe(path, tree)))


def verify(tree: str) -> None:
    """Read everything in `tree`.  Raises OSError at the first thing that cannot be read.

    More than any compression could hold is an error too, and not read for days.
    """
    volume = os.statvfs(tree)
    left = _BEST_COMPRESSION * volume.f_blocks * volume.f_frsize
    for path in walk(tree):
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode):
            left -= found.st_size
            if left < 0:
                raise OSError(f"{os.path.relpath(path, tree)!r} cannot be as large as it says")
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
        elif stat.S_ISLNK(found.st_mode):
            os.readlink(path)


# -- join and commit -------------------------------------------------------------------------


def join(output: str, trees: list[str]) -> None:
    """Write the changes in `trees` as one, the last on top."""
    target = f"{POINT}/joined"
    os.mkdir(target)
    for tree in trees:
        Overlay(tree, target).apply()
    make_image(target, output)


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


def commit(output: str, session: bool) -> None:
    """Write base and changes as one image, without what the agent adds.

    With `session`, what lies in the writable layer as well.
    """
    place = f"{WORK}/committed"
    os.mkdir(place)
    points = layers()
    if session:
        strip_generated(UPPER, points)
        points.append(UPPER)
    if len(points) == 1:
        raise OSError("there are no changes to commit")
    # Without the generated layer: only what images hold.
    lower = ":".join(reversed(points))
    syscalls.mount("apppot", place, "overlay", syscalls.MS_RDONLY, f"lowerdir={lower}")
    make_image(place, output)


def convert(output: str, archive: str, *words: str) -> None:
    """Write the tar `archive` as changes; with the word `plain`, none with lists of removals."""
    from apppot.guest.merge import extract

    extract.convert(archive, output, layers(), lists="plain" not in words)


_ACTIONS: dict[str, Callable[[list[str]], None]] = {
    "save": lambda rest: save(f"{_JOB_ROOT}/{rest[0]}"),
    "list": lambda rest: print_list(layers()[int(rest[0])]),
    "verify": lambda rest: verify(layers()[int(rest[0])]),
    "join": lambda rest: join(f"{_JOB_ROOT}/{rest[0]}", [layers()[int(n)] for n in rest[1:]]),
    "commit": lambda rest: commit(f"{_JOB_ROOT}/{rest[0]}", rest[1:] == ["session"]),
    "convert": lambda rest: convert(f"{_JOB_ROOT}/{rest[0]}", f"{WORK}/root{rest[1]}", *rest[2:]),
}


def main(words: list[str]) -> int:
    """Do what `words` say; errors are one line on stderr and status 1."""
    try:
        action, *rest = words
        _ACTIONS[action](rest)
    except (OSError, ValueError, LookupError) as error:
        sys.stderr.write(f"changes: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
