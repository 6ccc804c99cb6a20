"""Saving, listing and joining changes, inside a guest.

The pot's own program, run by the launcher as a job in the pot's root (`Job.in_pot`), where the
layers are mounted below the work directory:

    changes.py save OUTPUT        the writable layer as a changes file
    changes.py list LAYER         what is in a layer, as JSON lines on stdout
    changes.py verify LAYER       whether all of a layer can be read
    changes.py join OUTPUT N M…   several layers of changes as one, the last on top
    changes.py commit OUTPUT [session]
                                  base and changes, with the writable layer, as a new base
    changes.py convert OUTPUT ARCHIVE [plain]
                                  a tar, GNU tar's incremental ones too, as a changes file

Written as EROFS: it keeps nanoseconds, access control lists, extended attributes, hard links and
device nodes, whiteouts among them, and is mounted as it is.  Off the boot path: imports freely.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Callable

from apppot.guest import syscalls
from apppot.guest.merge.image import make_image, strip_generated
from apppot.guest.merge.overlay import OPAQUE, Overlay, is_opaque, is_whiteout, strip_private, walk
from apppot.guest.merge.root import WORK
from apppot.guest.merge.scratch import POINT, UPPER

_BEST_COMPRESSION = 1024  # four times what LZ4 reaches with zeros
_JOB_ROOT = WORK + "/root/home/user/job"


def layers() -> list[str]:
    """The mount points of the layers, base first."""
    numbers = sorted(int(name[5:]) for name in os.listdir(WORK) if name[5:].isdigit())
    return [f"{WORK}/layer{number}" for number in numbers]


# -- save ------------------------------------------------------------------------------------


def save(output: str) -> None:
    """Write the writable layer without what the agent generated."""
    strip_generated(UPPER, layers())
    strip_private(UPPER)
    make_image(UPPER, output)


# -- list ------------------------------------------------------------------------------------


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
