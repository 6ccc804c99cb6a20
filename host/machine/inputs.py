"""Writing the job directory's files to a config drive, for a guest that gets a copy of them.

A pax archive behind the job description: names of any bytes, modes, times to the nanosecond, hard
and symbolic links.  Holes of sparse files take no room on the drive.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, cast

from apppot.guest.protocol import drive, globs
from apppot.host.common.text import printable

_PIECE = 1 << 20
_ZEROS = bytes(_PIECE)
_KINDS = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
}

# A path below the job directory, and what lstat says of it.
Found = tuple[bytes, os.stat_result]
Tell = Callable[[bytes, str], None]


def _left_out(path: bytes, reason: str) -> None:
    name = os.fsdecode(path).encode(errors="backslashreplace").decode()
    sys.stderr.write(f"apppot: warning: {printable(name)} is not copied into the guest: {reason}\n")


def chosen(
    directory: str, patterns: Sequence[str], skip: str = "", tell: Tell = _left_out
) -> Iterator[Found]:
    """What the guest gets of `directory`: all, or what one of `patterns` names.

    Each path once, after the directories above it.  `skip` is left out with all that is in it;
    `tell` is told what cannot be read.
    """
    root = os.fsencode(directory)
    avoided = os.path.relpath(os.fsencode(skip), root) if skip else b".."
    seen: set[bytes] = set()
    for path, found in _named(root, patterns, tell):
        if path in seen or path == avoided or path.startswith(avoided + b"/"):
            continue
        seen.add(path)
        yield path, found


def _named(root: bytes, patterns: Sequence[str], tell: Tell) -> Iterator[Found]:
    if not patterns:
        yield from _readable(root, b"", tell)
    for pattern in patterns:
        for path in globs.find(root, os.fsencode(pattern)):
            parts = path.split(b"/")
            for depth in range(1, len(parts)):
                parent = b"/".join(parts[:depth])
                yield parent, os.lstat(os.path.join(root, parent))
            yield from _readable(root, path, tell)


def _readable(root: bytes, path: bytes, tell: Tell) -> Iterator[Found]:
    """`path` and all below it that can be listed."""
    waiting = [path]
    while waiting:
        path = waiting.pop()
        place = os.path.join(root, path)
        try:
            found = os.lstat(place) if path else os.stat(place)
            names = sorted(os.listdir(place), reverse=True) if stat.S_ISDIR(found.st_mode) else []
        except FileNotFoundError:
            continue  # gone since it was listed
        except OSError as error:
            tell(path, error.strerror or "")
            continue
        if path:
            yield path, found
        waiting += [os.path.join(path, name) for name in names]


def room(directory: str, patterns: Sequence[str], skip: str = "") -> int:
    """Bytes that the drive of these files will take, as they are now."""
    return sum(
        (found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0) + 4 * drive.BLOCK
        for _, found in chosen(directory, patterns, skip, tell=lambda *_: None)
    )


class _Sparse:
    """A file to write an archive to, in which whole pieces of zeros become holes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def tell(self) -> int:
        return self._file.tell()

    def write(self, data: bytes) -> int:
        if len(data) >= drive.BLOCK and data == _ZEROS[: len(data)]:
            self._file.seek(len(data), os.SEEK_CUR)
        else:
            self._file.write(data)
        return len(data)


def write(
    file: BinaryIO, job: bytes, directory: str, patterns: Sequence[str], skip: str = ""
) -> None:
    """Write a drive with the description `job` and the files of `directory` to `file`.

    Sockets, FIFOs, devices and what cannot be read are left out with a warning.  Raises OSError.
    """
    file.write(drive.first_member(job))
    with tarfile.TarFile(
        fileobj=cast("BinaryIO", _Sparse(file)),
        mode="w",
        format=tarfile.PAX_FORMAT,
        encoding=sys.getfilesystemencoding(),
        errors="surrogateescape",
        copybufsize=_PIECE,
    ) as archive:
        links: dict[tuple[int, int], str] = {}
        for path, found in chosen(directory, patterns, skip):
            _add(archive, os.fsencode(directory), path, found, links)
    # A hole at the very end is none until the file is that long.
    file.truncate(file.tell())


def _add(
    archive: tarfile.TarFile,
    root: bytes,
    path: bytes,
    found: os.stat_result,
    links: dict[tuple[int, int], str],
) -> None:
    kind = _KINDS.get(stat.S_IFMT(found.st_mode))
    if kind is None:
        _left_out(path, "it is neither a file nor a directory")
        return
    place = os.path.join(root, path)
    try:
        if kind == tarfile.REGTYPE:
            _add_file(archive, place, path, links)
        else:
            target = os.readlink(place) if kind == tarfile.SYMTYPE else b""
            archive.addfile(_member(path, found, kind, target))
    except FileNotFoundError:
        return  # gone since it was listed
    except PermissionError as error:
        _left_out(path, error.strerror or "")


def _add_file(
    archive: tarfile.TarFile, place: bytes, path: bytes, links: dict[tuple[int, int], str]
) -> None:
    # Not blocking: it may have become a FIFO since it was listed.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(place, flags), "rb", buffering=0) as source:
        found = os.fstat(source.fileno())
        key = found.st_dev, found.st_ino
        if found.st_nlink > 1 and key in links:
            archive.addfile(_member(path, found, tarfile.LNKTYPE, os.fsencode(links[key])))
            return
        member = _member(path, found, tarfile.REGTYPE)
        member.size = found.st_size
        try:
            archive.addfile(member, cast("BinaryIO", source))
        except OSError as error:
            if error.errno is not None:
                raise
            name = os.fsdecode(path)
            raise OSError(errno.EIO, f"{name} became shorter while it was copied") from error
        links[key] = member.name


def _member(
    path: bytes, found: os.stat_result, kind: bytes, target: bytes = b""
) -> tarfile.TarInfo:
    member = tarfile.TarInfo(os.fsdecode(drive.JOB_FILES + path))
    member.type, member.mode = kind, stat.S_IMODE(found.st_mode)
    member.linkname = os.fsdecode(target)
    seconds, rest = divmod(found.st_mtime_ns, 10**9)
    member.pax_headers = {"mtime": f"{seconds}.{rest:09d}"}
    return member


# Up to this many bytes a drive lies in the run directory, which is memory.
IN_MEMORY = 32 << 20


def open_disk(place: str) -> int:
    """A file for a large drive in the directory `place`, without a name: gone with the guest."""
    return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
