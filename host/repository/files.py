"""What is remembered of repositories, and locks that processes of one user share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from apppot.host.common import locks
from apppot.host.common.errors import RepositoryError
from apppot.host.common.files import require_json, write_json

_VERSION_KEY = "schema"


def write_state(path: str, data: dict[str, Any], mode: int = 0o644) -> None:
    """Write an object as versioned JSON, atomically.  Raises OSError."""
    write_json(path, data, mode, key=_VERSION_KEY)


def read_state(path: str) -> dict[str, Any]:
    """The object that `write_state` wrote, {} where there is none.

    Raises RepositoryError for damage and for what a newer version wrote.
    """
    return require_json(path, RepositoryError, "mend or remove it", key=_VERSION_KEY) or {}


@contextmanager
def locked(path: str, notice: str = "") -> Iterator[bool]:
    """Hold the lock file `path`; yields whether another process had it first.

    `notice` goes to stderr before a wait.  The kernel lets go of the lock when its holder dies,
    however it dies.  The file stays: removing it would let two processes hold "the" lock.
    """
    import sys

    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle = locks.try_acquire(path)
    waited = handle is None
    if handle is None:
        if notice:
            sys.stderr.write(notice + "\n")
        handle = locks.acquire(path)
    try:
        yield waited
    finally:
        os.close(handle)


def note_failure(path: str, error: RepositoryError) -> None:
    """Leave word for those who wait for the lock: a thousand jobs need not fail one by one."""
    try:
        write_state(path, {"cause": error.cause, "hint": error.hint})
    except OSError:
        pass


def raise_noted(path: str, since: float) -> None:
    """Raise what `note_failure` left at `path` after `since` (seconds since the epoch)."""
    try:
        if os.stat(path).st_mtime < since:
            return
    except OSError:
        return
    noted = read_state(path)
    raise RepositoryError(str(noted.get("cause")), str(noted.get("hint", "")))
