"""Files that appear whole or not at all, and locks that processes of one user share."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from apppot.host.errors import RepositoryError

PARTIAL = ".partial"
SCHEMA = 1


def write_atomic(path: str, content: bytes, mode: int = 0o644) -> None:
    """Put `content` in place in one step: temporary file, fsync, rename, fsync.

    Creates missing directories.  Raises OSError.
    """
    import tempfile

    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_directory(directory)


def sync_directory(path: str) -> None:
    """Make the names in a directory outlive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_state(path: str, data: dict[str, Any], mode: int = 0o644) -> None:
    """Write an object as versioned JSON, atomically."""
    text = json.dumps({"schema": SCHEMA, **data}, indent=1, sort_keys=True) + "\n"
    write_atomic(path, text.encode(), mode)


def read_state(path: str) -> dict[str, Any]:
    """The object that `write_state` wrote, {} where there is none.

    Raises RepositoryError for damage and for what a newer version wrote.
    """
    try:
        with open(path, encoding="utf-8") as handle:
            data = json.load(handle)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise RepositoryError(f"{path} cannot be read: {error}", "mend or remove it") from None
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        raise RepositoryError(f"{path} is damaged", "mend or remove it")
    if data["schema"] > SCHEMA:
        raise RepositoryError(f"{path} was written by a newer AppPot", "update this AppPot")
    return data


@contextmanager
def locked(path: str, notice: str = "") -> Iterator[bool]:
    """Hold the lock file `path`; yields whether another process had it first.

    `notice` goes to stderr before a wait.  The kernel lets go of the lock when its holder dies,
    however it dies.  The file stays: removing it would let two processes hold "the" lock.
    """
    import fcntl
    import sys

    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        waited = False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            if notice:
                sys.stderr.write(notice + "\n")
            fcntl.flock(handle, fcntl.LOCK_EX)
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
