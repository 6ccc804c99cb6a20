"""What the patterns of a job's outputs name, in a guest with a launcher and in one without.

A relative pattern is one of the job directory, and keeps its path there.  An absolute one is one of
the job's root, seen as the job sees it; what it names comes back under its last name.
"""

from __future__ import annotations

import os

from apppot.guest import syscalls
from apppot.guest.protocol import globs

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Iterator


def find(root: int, job: bytes, pattern: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """What `pattern` names: a directory, a path below it, and the name under which it comes back.

    `root` is a descriptor of the job's root, `job` the job directory's path for this process.
    Raises OSError for what cannot be read, GlobError for a pattern that leaves its directory.
    """
    if not pattern.startswith(b"/"):
        for path in globs.find(job, pattern):
            yield job, path, path
        return
    folder, below = _split(root, pattern)
    for path in globs.find(folder, below) if folder else ():
        yield folder, path, os.path.basename(path)


def same(one: bytes, other: bytes) -> bool:
    """Whether two paths, as `find` gives them in two parts, name one file."""
    if one == other:
        return True
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False


def _split(root: int, pattern: bytes) -> tuple[bytes, bytes]:
    """An absolute pattern as a directory (empty: there is none) and a pattern below it."""
    parts = globs.checked(pattern)
    fixed = len(parts) - 1
    for number, part in enumerate(parts[:-1]):
        if globs.is_magic(part):
            fixed = number
            break
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        fd = syscalls.open_in_root(root, b"/".join(parts[:fixed]) or b".", flags)
    except OSError:
        return b"", b""
    # Never closed: it names the directory until the guest ends.
    return b"/proc/self/fd/%d" % fd, b"/".join(parts[fixed:])
