"""The run directory: one VM's private files on the host, gone when its launcher is gone.

The launcher holds a lock in it; a keeper process outlives the launcher for the moment that it
takes to remove it, whatever killed the launcher; what a crash of the host left is swept by the
next start.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping

from apppot.host.errors import ApppotError

_PREFIX = "apppot-"
_LOCK = "lock"
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./+")

# Reads one line: "done" when the launcher has cleaned up by itself.  End of file without it
# means that the launcher was killed: restore its terminal, remove its directory.
_KEEPER = """
trap '' HUP INT TERM QUIT TSTP
read -r word
[ -n "$2" ] && [ "$word" != done ] && stty -F "$2" "$3" 2>/dev/null
exec rm -rf -- "$1"
"""


def candidates(env: Mapping[str, str]) -> list[str]:
    """Where a run directory may lie, memory-backed places first."""
    places = [env.get("XDG_RUNTIME_DIR", ""), "/dev/shm", env.get("TMPDIR", ""), "/tmp"]
    return [p for p in places if p.startswith("/") and set(p) <= _PLAIN and len(p) < 60]


class RunDir:
    """A private directory (mode 0700) and the process that removes it."""

    def __init__(self, path: str, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._keeper: int | None = None
        self._pipe: int | None = None

    @classmethod
    def create(cls, env: Mapping[str, str] = os.environ, memory: str | None = None) -> RunDir:
        """Make one, after sweeping what killed launchers left.  Raises ApppotError.

        `memory` is the place that it must lie in, when the guest's memory file lies in it.
        """
        places = candidates(env) if memory is None else [memory]
        for place in places:
            sweep(place)
            path = os.path.join(place, f"{_PREFIX}{os.getuid()}-{os.urandom(6).hex()}")
            try:
                os.mkdir(path, 0o700)
            except OSError:
                continue
            lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            return cls(path, lock)
        raise ApppotError(
            f"no place for the run directory: tried {', '.join(places)}",
            "make one of them writable, or set TMPDIR to a directory that is",
        )

    def keep(self, terminal: str = "", settings: str = "") -> None:
        """Start the keeper.  `terminal` and `settings` (stty -g) are what it restores."""
        read, write = os.pipe()
        argv = ["sh", "-c", _KEEPER, "apppot-keeper", self.path, terminal, settings]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        actions = [(os.POSIX_SPAWN_DUP2, read, 0)]
        actions += [(os.POSIX_SPAWN_DUP2, null, number) for number in (1, 2)]
        environment = {"PATH": "/usr/bin:/bin"}
        self._keeper = os.posix_spawn(
            "/bin/sh", argv, environment, file_actions=actions, setsid=True
        )
        self._pipe = write
        os.close(read)
        os.close(null)

    def file(self, name: str, data: bytes) -> str:
        """Write a private file; its path."""
        path = os.path.join(self.path, name)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        return path

    def directory(self, name: str) -> str:
        """Make a private directory in it; its path."""
        path = os.path.join(self.path, name)
        os.mkdir(path, 0o700)
        return path

    def remove(self) -> None:
        """Remove the directory and end the keeper."""
        _remove_tree(self.path)
        if self._pipe is not None and self._keeper is not None:
            os.write(self._pipe, b"done\n")
            os.close(self._pipe)
            os.waitpid(self._keeper, 0)
            self._pipe = None
        os.close(self._lock)


def sweep(place: str) -> None:
    """Remove the caller's run directories in `place` whose launcher is gone."""
    prefix = f"{_PREFIX}{os.getuid()}-"
    try:
        names = [name for name in os.listdir(place) if name.startswith(prefix)]
    except OSError:
        return
    for name in names:
        _sweep_one(os.path.join(place, name))


def _sweep_one(path: str) -> None:
    try:
        if os.lstat(path).st_uid != os.getuid():
            return
        lock = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # just being made, or already going
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove_tree(path)
    except OSError:
        pass  # its launcher lives
    finally:
        os.close(lock)


def _remove_tree(path: str) -> None:
    """Remove `path` and all in it; what is gone already is fine.  Follows no symbolic link."""
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _remove_tree(entry.path)
                else:
                    _unlink(entry.path)
        os.rmdir(path)
    except FileNotFoundError:
        pass


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
