"""Sessions: a writable layer that is kept on the host under a name, for one user at a time.

A session is a sparse disk file, which the guest gives its file system, and a record of the image
it belongs to.  Whoever uses it holds a lock; what a crash left is mended by the disk's journal.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict

from apppot.host.common import locks, unfinished
from apppot.host.common.errors import ApppotError, UsageError
from apppot.host.common.files import read_json, write_json
from apppot.host.common.frozen import frozen
from apppot.host.common.paths import data_home
from apppot.host.common.units import timestamp

_VERSION = 1
_MAKING, _GONE = "making", "gone"  # no session's name: those have no dot before them
DEFAULT_SIZE = 16 << 30
_LEAST_SIZE = 64 << 20
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.+")


class SessionError(ApppotError):
    """A session is missing, in use, or belongs to another image."""


@frozen
class Session:
    """What is known about a session.

    `base` is the image's digest, and behind a + those of changes over it; "host" for that image.
    """

    name: str
    image: str
    base: str
    created: str
    changes: tuple[str, ...] = ()  # files that lie between the image and it, lowest first

    @property
    def folder(self) -> str:
        return os.path.join(home(), self.name)

    @property
    def disk(self) -> str:
        return os.path.join(self.folder, "disk.ext4")

    def size(self) -> int:
        """Bytes that it may grow to."""
        return os.stat(self.disk).st_size if os.path.exists(self.disk) else 0

    def used(self) -> int:
        """Bytes that it takes on the host's disk."""
        return os.stat(self.disk).st_blocks * 512 if os.path.exists(self.disk) else 0


def home() -> str:
    """Where the user's sessions lie."""
    return os.path.join(data_home(), "sessions")


def check_name(name: str) -> None:
    """Raise UsageError for a name that cannot be a directory's."""
    if not name or name.startswith(".") or not set(name) <= _NAME_CHARACTERS or len(name) > 100:
        raise UsageError(f"{name!r} cannot name a session", "use letters, digits and - _ . +")


def find(name: str) -> Session | None:
    """The session of that name, if there is one.  Raises SessionError where it is damaged."""
    check_name(name)
    path = os.path.join(home(), name, "session.json")
    value = read_json(path, _VERSION)
    if value is None:
        if not os.path.exists(path):
            return None
        raise _damaged(name, "its record cannot be read, or another version of AppPot made it")
    del value["version"]
    try:
        session = Session(**{**value, "changes": tuple(value["changes"])})
    except (TypeError, KeyError) as error:
        raise _damaged(name, f"{error}") from error
    if not os.path.exists(session.disk):
        raise _damaged(name, "its disk is gone")
    return session


def _damaged(name: str, why: str) -> SessionError:
    hint = f"look at {os.path.join(home(), name)}, or delete it: apppot session rm {name}"
    return SessionError(f"session {name} is damaged: {why}", hint)


def get(name: str) -> Session:
    """The session of that name.  Raises SessionError where there is none."""
    found = find(name)
    if found is None:
        names = ", ".join(session.name for session in list_sessions()) or "none"
        raise SessionError(f"there is no session {name}", f"sessions: {names}")
    return found


def list_sessions() -> list[Session]:
    """All sessions, by name; a damaged one has no image."""
    found = [_find_any(name) for name in sorted(listdir()) if not name.startswith(".")]
    return [session for session in found if session is not None]


def listdir() -> list[str]:
    try:
        return os.listdir(home())
    except FileNotFoundError:
        return []


def _find_any(name: str) -> Session | None:
    """As `find`; a session whose record cannot be read has only its name."""
    try:
        return find(name)
    except SessionError:
        return Session(name, "", "", "")
    except UsageError:
        return None  # no session's folder


def get_any(name: str) -> Session:
    """As `get`, and what is damaged too: to be deleted.  Raises SessionError."""
    check_name(name)
    return _find_any(name) or get(name)


def create(
    name: str, image: str, base: str, changes: tuple[str, ...] = (), size: int = DEFAULT_SIZE
) -> Session:
    """Make a session of `size` bytes at most, for the image `image` with digest `base`.

    A session appears whole or not at all.  Raises SessionError where none can be made.
    """
    check_name(name)
    if size < _LEAST_SIZE:
        raise UsageError(f"a session of {size >> 20} MiB is too small", "64M or more")
    session = Session(name, image, base, timestamp(), changes)
    try:
        os.makedirs(home(), mode=0o700, exist_ok=True)
        _sweep()
        with unfinished.making(home(), _MAKING) as making:
            os.mkdir(making, 0o700)
            _fill(making, session, size)
            with suppress(OSError):  # another launcher made it in the same moment
                os.rename(making, session.folder)
                return session
    except OSError as error:
        raise SessionError(
            f"no session can be made in {home()}: {error.strerror}",
            "set XDG_DATA_HOME to a directory with room that you can write to",
        ) from error
    return get(name)


def _fill(making: str, session: Session, size: int) -> None:
    fd = os.open(os.path.join(making, "disk.ext4"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(fd, size)
    finally:
        os.close(fd)
    write_json(os.path.join(making, "session.json"), asdict(session), version=_VERSION)


def resize(session: Session, size: int) -> None:
    """Let it grow to `size` bytes; its file system follows at the next use."""
    if size < session.size():
        raise UsageError(
            f"session {session.name} has {session.size() >> 20} MiB and cannot become smaller",
            "save its changes and begin a new one",
        )
    with held(session):
        os.truncate(session.disk, size)


def remove(session: Session) -> None:
    """Delete it."""
    with held(session), unfinished.making(home(), _GONE) as doomed:
        os.rename(session.folder, doomed)
    _sweep()


def _sweep() -> None:
    """Remove what processes that were killed have left half made or half deleted."""
    for name in (_MAKING, _GONE):
        unfinished.sweep(home(), name)


@contextmanager
def held(session: Session) -> Iterator[None]:
    """Hold the session.  Raises SessionError when another holds it, naming who."""
    path = os.path.join(session.folder, "lock")
    lock = locks.try_acquire(path)
    if lock is None:
        raise SessionError(
            f"session {session.name} is in use by {_holder(path)}",
            "leave the console that has it, or use another name",
        )
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def _holder(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as lock:
            return lock.read(200).strip() or "another process"
    except OSError:
        return "another process"


def check_base(session: Session, base: str) -> None:
    """Raise SessionError when the session belongs to another image."""
    if session.base != base:
        raise SessionError(
            f"session {session.name} belongs to {session.image} ({session.base[:12]}), "
            f"not to this image ({base[:12]})",
            f"name that image, use another session, or delete it: apppot session rm {session.name}",
        )
