"""Patterns of paths, as `--input` and `--output` have them: the same on both sides.

As in a shell: `*`, `?` and `[…]` match neither `/` nor a leading dot; `**` is any number of
directories.  What matches may be a directory, which stands for all that is in it.  Symbolic links
are matched, never followed.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Iterator

_MAGIC = b"*?["


class GlobError(ValueError):
    """A pattern that cannot name anything in a directory."""


def checked(pattern: bytes) -> list[bytes]:
    """The components of a relative pattern.  Raises GlobError for one that leaves its directory."""
    parts = [part for part in pattern.split(b"/") if part not in (b"", b".")]
    if not parts or b".." in parts or b"\0" in pattern:
        raise GlobError(f"{os.fsdecode(pattern)!r} names nothing in a directory")
    return parts


def is_magic(text: bytes) -> bool:
    """Whether `text` is a pattern, not just a name."""
    return any(byte in text for byte in _MAGIC)


def find(root: bytes, pattern: bytes) -> Iterator[bytes]:
    """The paths below `root`, relative to it, that match; each once for each way to match."""
    yield from _match(root, b"", checked(pattern))


def walk(root: bytes, path: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    """`path` (relative to `root`) and all below it, with lstat; a directory before its entries.

    What cannot be read or goes away meanwhile raises OSError with its path.
    """
    waiting = [path]
    while waiting:
        path = waiting.pop()
        place = os.path.join(root, path)
        found = os.lstat(place) if path else os.stat(place)
        if path:
            yield path, found
        if found.st_mode & 0o170000 == 0o040000:
            names = sorted(os.listdir(place), reverse=True)
            waiting += [os.path.join(path, name) for name in names]


def _match(root: bytes, folder: bytes, parts: list[bytes]) -> Iterator[bytes]:
    first, rest = parts[0], parts[1:]
    if first == b"**":
        for name in _names(root, folder):
            path = os.path.join(folder, name)
            if name[:1] != b"." and _is_directory(root, path):
                yield from _match(root, path, parts)
            elif not rest and name[:1] != b".":
                yield path
        if rest:
            yield from _match(root, folder, rest)
    elif is_magic(first):
        import fnmatch  # with `re` behind it, which most jobs need not wait for

        for name in _names(root, folder):
            hidden = name[:1] == b"." and first[:1] != b"."
            if not hidden and fnmatch.fnmatchcase(name, first):
                yield from _deeper(root, os.path.join(folder, name), rest)
    elif os.path.lexists(os.path.join(root, folder, first)):
        yield from _deeper(root, os.path.join(folder, first), rest)


def _deeper(root: bytes, path: bytes, rest: list[bytes]) -> Iterator[bytes]:
    if not rest:
        yield path
    elif _is_directory(root, path):
        yield from _match(root, path, rest)


def _names(root: bytes, folder: bytes) -> list[bytes]:
    return sorted(os.listdir(os.path.join(root, folder) or b"."))


def _is_directory(root: bytes, path: bytes) -> bool:
    return os.lstat(os.path.join(root, path)).st_mode & 0o170000 == 0o040000
