"""A read-only ext4 image from folders, without root, the same bytes for the same input.

mke2fs makes an empty file system with fixed identifiers, debugfs fills it from a sorted script.
Owners, modes and times come from here, not from the host's files.  No journal and only old
features, so that Debian's stock User-Mode Linux 6.1 mounts it without modules.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path

from apppot.host.common.errors import BuildError
from apppot.host.common.frozen import frozen
from apppot.host.process.run import run

BLOCK = 4096
INODE = 256
RESERVED_INODES = 11
FEATURES = "none,extent,filetype,sparse_super,large_file,ext_attr,extra_isize,dir_index"


@frozen
class Inode:
    """One name in the image.  `source` is the host file of a regular file."""

    path: str
    mode: int
    source: str = ""
    target: str = ""
    device: tuple[int, int] = (0, 0)
    size: int = 0


@frozen
class ImageSpec:
    """What identifies an image: UUID, label, and the time (s since 1970) of all that is in it."""

    uuid: str
    label: str
    time: int
    modes: Mapping[str, int] = field(default_factory=dict)
    devices: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@frozen
class Tools:
    """How to start mke2fs and debugfs: the words that precede a tool's arguments."""

    mke2fs: tuple[str, ...]
    debugfs: tuple[str, ...]
    e2fsck: tuple[str, ...]


def scan(root: Path, spec: ImageSpec) -> Iterator[Inode]:
    """All of a folder, parents first; modes normal (0755, 0644) but for those in the spec."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted([*folders, *files]):
            full = os.path.join(folder, name)
            yield _entry(full, os.path.relpath(full, root), spec)
        folders[:] = [name for name in folders if not os.path.islink(os.path.join(folder, name))]


def _entry(full: str, path: str, spec: ImageSpec) -> Inode:
    status = os.lstat(full)
    if set('"\\\n') & set(path):
        raise BuildError(f"{path!r} cannot go into the image: odd characters in its name")
    if stat.S_ISLNK(status.st_mode):
        return Inode(path, stat.S_IFLNK | 0o777, target=os.readlink(full))
    if stat.S_ISDIR(status.st_mode):
        return Inode(path, stat.S_IFDIR | spec.modes.get(path, 0o755))
    if not stat.S_ISREG(status.st_mode):
        raise BuildError(f"{path} is neither file, folder nor link")
    mode = spec.modes.get(path, 0o755 if status.st_mode & 0o111 else 0o644)
    return Inode(path, stat.S_IFREG | mode, source=full, size=status.st_size)


def merge(roots: Sequence[Path], spec: ImageSpec) -> list[Inode]:
    """Several folders as one, a later one over an earlier one, with the spec's devices."""
    found = {entry.path: entry for root in roots for entry in scan(root, spec)}
    for path, device in spec.devices.items():
        mode = stat.S_IFCHR | spec.modes.get(path, 0o666)
        found[path] = Inode(path, mode, device=device)
    return [found[path] for path in sorted(found, key=lambda path: path.split("/"))]


def script(entries: Sequence[Inode]) -> str:
    """The debugfs commands that write the entries, parents before children."""
    lines = []
    current = ""
    for entry in entries:
        folder, name = os.path.split(entry.path)
        if folder != current:
            lines.append(f'cd "/{folder}"')
            current = folder
        match stat.S_IFMT(entry.mode):
            case stat.S_IFDIR:
                lines.append(f'mkdir "{name}"')
            case stat.S_IFLNK:
                lines.append(f'symlink "{name}" "{entry.target}"')
            case stat.S_IFCHR:
                lines.append(f'mknod "{name}" c {entry.device[0]} {entry.device[1]}')
            case _:
                lines.append(f'write "{entry.source}" "{name}"')
        if not stat.S_ISLNK(entry.mode):
            lines.append(f'sif "{name}" mode 0{entry.mode:o}')
        if stat.S_ISREG(entry.mode):
            lines += [f'sif "{name}" uid 0', f'sif "{name}" gid 0']
    return "\n".join(lines) + "\n"


def blocks_needed(entries: Sequence[Inode], inodes: int) -> int:
    """Blocks of an image that holds the entries, with little to spare."""
    data = sum(-(-entry.size // BLOCK) for entry in entries)
    folders = 2 * sum(stat.S_ISDIR(entry.mode) for entry in entries)
    links = sum(len(entry.target) > 59 for entry in entries)
    tables = inodes * INODE // BLOCK
    return 64 + tables + (data + folders + links) * 101 // 100


def write_image(roots: Sequence[Path], target: Path, spec: ImageSpec, tools: Tools) -> None:
    """Write `target`; raises BuildError or ToolError, and leaves nothing of use then."""
    entries = merge(roots, spec)
    inodes = -(-(len(entries) + RESERVED_INODES + 16) // 32) * 32
    blocks = blocks_needed(entries, inodes)
    env = {
        "PATH": os.defpath,
        "LC_ALL": "C",
        "MKE2FS_CONFIG": os.devnull,
        "MKE2FS_DETERMINISTIC": "1",
        "E2FSPROGS_FAKE_TIME": str(spec.time),
        "SOURCE_DATE_EPOCH": str(spec.time),
    }
    target.unlink(missing_ok=True)
    words = ["-q", "-F", "-t", "ext4", "-O", FEATURES, "-b", str(BLOCK), "-I", str(INODE)]
    words += ["-N", str(inodes), "-m", "0", "-U", spec.uuid, "-L", spec.label, "-E"]
    words.append(f"hash_seed={spec.uuid},root_owner=0:0,lazy_itable_init=0,nodiscard")
    run([*tools.mke2fs, *words, str(target), str(blocks)], env=env)
    feed = target.with_name(f"{target.name}.debugfs")
    feed.write_text(script(entries))
    done = run([*tools.debugfs, "-w", "-f", str(feed), str(target)], env=env)
    feed.unlink()
    _check(done.stderr.decode(errors="replace"))
    run([*tools.e2fsck, "-fn", str(target)], env=env)


def _check(errors: str) -> None:
    """debugfs returns 0 whatever happens; what it says on stderr is the verdict."""
    wrong = [line for line in errors.splitlines() if line and not line.startswith("debugfs 1.")]
    if wrong:
        raise BuildError(f"the runtime's image could not be written: {wrong[0]}")
