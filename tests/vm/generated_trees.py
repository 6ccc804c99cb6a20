"""What the guest of test_generated_trees.py executes: operations on trees, and their exact listing.

`generated_trees.py apply FILE` does to each directory of PLACES what FILE says (JSON), then lists
all of them; without it, only lists.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import random
import shutil
import stat
import struct
import sys
from collections.abc import Callable

# Directories of the base image with files, links and directories in them.
PLACES = sorted(glob.glob(b"/usr/share/man/*") + glob.glob(b"/usr/share/doc/*"))


def below(root: bytes) -> list[bytes]:
    """Everything at and below `root`."""
    found = [root]
    for folder, folders, files in os.walk(root):
        found += [folder + b"/" + name for name in folders + files]
    return sorted(found)


def apply(root: bytes, operations: list[list[str | int]]) -> None:
    """Do them; what the file system does not allow, or is gone since the last look, is left out."""
    for number, (kind, one, other, name, seed) in enumerate(operations):
        if number % 5 == 0:
            paths = below(root)
        path, second = paths[int(one) % len(paths)], paths[int(other) % len(paths)]
        folder = second if os.path.isdir(second) and not os.path.islink(second) else root
        new = folder + b"/" + bytes.fromhex(str(name))
        try:
            _DO[str(kind)](path, new, random.Random(seed))
        except (OSError, shutil.Error):
            continue


def write(path: bytes, new: bytes, chance: random.Random) -> None:
    # Nothing is written to a device, and a FIFO would wait for its reader.
    target = path if chance.random() < 0.3 and stat.S_ISREG(os.stat(path).st_mode) else new
    if os.path.lexists(target) and not os.path.isfile(target):
        return
    with open(target, "wb") as file:
        for _ in range(chance.randrange(3)):
            file.seek(chance.choice((0, 0, 5000, 1 << 20)), os.SEEK_CUR)
            file.write(chance.randbytes(chance.randrange(9000)))
        file.truncate(file.tell() + chance.choice((0, 0, 100_000)))


def remove(path: bytes, new: bytes, chance: random.Random) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def replace(path: bytes, new: bytes, chance: random.Random) -> None:
    """By something of another kind, under the same name."""
    remove(path, new, chance)
    kind = chance.choice((os.mkdir, write_at, node, lambda place: os.symlink(new, place)))
    kind(path)
    if os.path.isdir(path):
        write_at(path + b"/" + os.path.basename(new))


def write_at(path: bytes) -> None:
    with open(path, "wb") as file:
        file.write(path)


def node(path: bytes, kind: int = stat.S_IFCHR, device: tuple[int, int] = (7, 300)) -> None:
    os.mknod(path, kind | 0o640, os.makedev(*device))


def special(path: bytes, new: bytes, chance: random.Random) -> None:
    kind = chance.choice((stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))
    node(new, kind, (chance.randrange(1, 250), chance.randrange(1 << 18)))


def times(path: bytes, new: bytes, chance: random.Random) -> None:
    moment = chance.randrange(-(2**31), 2**34 - 2**32) * 10**9 + chance.randrange(10**9)
    os.utime(path, ns=(moment, moment), follow_symlinks=False)


def owner(path: bytes, new: bytes, chance: random.Random) -> None:
    ids = (0, 1, 1000, 54321, 65534, 70000, 2**31)
    os.chown(path, chance.choice(ids), chance.choice(ids), follow_symlinks=False)


def attribute(path: bytes, new: bytes, chance: random.Random) -> None:
    name, value = chance.choice(
        (
            ("user.note", chance.randbytes(chance.randrange(200))),
            (f"user.{chance.randrange(4)}", b""),
            ("trusted.note", chance.randbytes(9)),
            ("security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)),
            ("system.posix_acl_access", _acl(chance)),
            ("system.posix_acl_default", _acl(chance)),
        )
    )
    os.setxattr(path, name, value, follow_symlinks=False)


def _acl(chance: random.Random) -> bytes:
    entries = [(1, 7, -1), (2, chance.randrange(8), chance.choice((5, 1000, 70000))), (4, 5, -1)]
    entries += [(8, chance.randrange(8), 33), (16, chance.randrange(8), -1), (32, 4, -1)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


_DO: dict[str, Callable[[bytes, bytes, random.Random], object]] = {
    "write": write,
    "remove": remove,
    "replace": replace,
    "special": special,
    "times": times,
    "owner": owner,
    "attribute": attribute,
    "directory": lambda path, new, chance: os.mkdir(new, chance.randrange(0o1000) | 0o700),
    "link": lambda path, new, chance: os.symlink(chance.choice((path, new, b"x" * 300)), new),
    "hard link": lambda path, new, chance: os.link(path, new, follow_symlinks=False),
    "rename": lambda path, new, chance: os.rename(path, new),
    "mode": lambda path, new, chance: os.chmod(path, chance.randrange(0o10000)),
}
KINDS = tuple(_DO)


def describe(path: bytes, links: dict[tuple[int, int], str]) -> list[object]:
    """All that has to be the same again."""
    found = os.lstat(path)
    kind = stat.S_IFMT(found.st_mode)
    entry: list[object] = [path.hex(), kind, stat.S_IMODE(found.st_mode)]
    entry += [found.st_uid, found.st_gid, found.st_mtime_ns]
    if kind != stat.S_IFDIR:
        first = links.setdefault((found.st_dev, found.st_ino), path.hex())
        entry += [found.st_nlink, first if found.st_nlink > 1 else "", found.st_rdev]
    if kind == stat.S_IFLNK:
        entry.append(os.readlink(path).hex())
    if kind == stat.S_IFREG:
        with open(path, "rb") as file:
            entry += [found.st_size, hashlib.sha256(file.read()).hexdigest()]
    return [*entry, attributes(path)]


def attributes(path: bytes) -> list[list[str]]:
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
    except OSError:  # a base without any
        return []
    return [[name, os.getxattr(path, name, follow_symlinks=False).hex()] for name in names]


def main() -> None:
    print(os.uname().release)
    if sys.argv[1:2] == ["apply"]:
        with open(sys.argv[2], encoding="ascii") as file:
            for place, operations in zip(PLACES, json.load(file)):  # noqa: B905 (Python 3.9)
                apply(place, operations)
    links: dict[tuple[int, int], str] = {}
    for place in PLACES:
        for path in below(place) if os.path.lexists(place) else ():
            print(json.dumps(describe(path, links)))


if __name__ == "__main__":
    main()
