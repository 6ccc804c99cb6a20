"""The run directory: one VM's private files on the host, gone when its launcher is gone.

The launcher holds a lock in it; a keeper process outlives the launcher for the moment that it
takes to remove it, whatever killed the launcher; what a crash of the host left is swept by the
next start.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from contextlib import suppress

from apppot.host.common import locks
from apppot.host.common.errors import ApppotError
from apppot.host.common.files import write_all

_PREFIX = "apppot-"
_LOCK = "lock"
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./+")

# Reads the process groups that the launcher starts, then "done" when it has cleaned up by itself.
# End of file without that means that the launcher was killed: end what it started, restore its
# terminal, remove its directory.  The groups may still be dying while the directory goes.
_KEEPER = """
trap '' HUP INT TERM QUIT TSTP
groups=
while read -r word; do
    [ "$word" = done ] && exit
    groups="$groups -$word"
done
for group in $groups; do kill -s KILL -- "$group"; done
[ -n "$2" ] && stty "$2" <&3
for attempt in 1 2 3 4 5 6 7 8; do
    rm -rf -- "$1" && exit
    sleep 0.1
done
"""


def candidates(env: Mapping[str, str]) -> list[str]:
    """Where a run directory may lie, memory-backed places first."""
    places = [env.get("XDG_RUNTIME_DIR", ""), "/dev/shm", env.get("TMPDIR", ""), "/tmp"]
    return [p for p in places if p.startswith("/") and set(p) <= _PLAIN and len(p) < 60]


class RunDir:
    """A private directory (mode 0700) and the process that removes it."""

    def __init__(self, path: str, keeper: Keeper, lock: int) -> None:
        self.path = path
        self._keeper = keeper
        self._lock = lock

    @classmethod
    def create(
        cls,
        env: Mapping[str, str] = os.environ,
        memory: str | None = None,
        terminal: tuple[int, str] | None = None,
    ) -> RunDir:
        """Make one, after sweeping what killed launchers left.  Raises ApppotError.

        `memory` is the place that it must lie in, when the guest's memory file lies in it.
        `terminal` is what the keeper restores: a descriptor and settings (stty -g).
        """
        places = candidates(env) if memory is None else [memory]
        for place in places:
            sweep(place)
            if not os.access(place, os.W_OK | os.X_OK):
                continue
            path = os.path.join(place, f"{_PREFIX}{os.getuid()}-{os.urandom(6).hex()}")
            # The keeper first, so that at no moment a directory has none.
            keeper = Keeper(path, terminal)
            lock = _make_locked(path)
            if lock is not None:
                return cls(path, keeper, lock)
            keeper.dismiss()
        raise ApppotError(
            f"no place for the run directory: tried {', '.join(places)}",
            "make one of them writable, or set TMPDIR to a directory that is",
        )

    def ends_with_us(self, group: int) -> None:
        """Have the keeper kill this process group when the launcher is killed."""
        self._keeper.add(group)

    def file(self, name: str, data: bytes) -> str:
        """Write a private file; its path."""
        path = os.path.join(self.path, name)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, data)
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
        self._keeper.dismiss()
        os.close(self._lock)


class Keeper:
    """A shell that outlives the launcher for the moment that cleaning up takes."""

    def __init__(self, path: str, terminal: tuple[int, str] | None) -> None:
        read, self._pipe = os.pipe()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        moves = [(read, 0), (null, 1), (null, 2)]
        opened = [read, null]
        settings = ""
        if terminal is not None:
            fd, settings = terminal
            # Out of the way of the numbers that the moves before it fill.
            opened.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10))
            moves.append((opened[-1], 3))
        self._pid = os.posix_spawn(
            "/bin/sh",
            ["sh", "-c", _KEEPER, "apppot-keeper", path, settings],
            {"PATH": "/usr/bin:/bin"},
            file_actions=[(os.POSIX_SPAWN_DUP2, *move) for move in moves],
            setsid=True,
        )
        for fd in opened:
            os.close(fd)

    def add(self, group: int) -> None:
        """One more process group that must not outlive the launcher."""
        self._tell(b"%d\n" % group)

    def dismiss(self) -> None:
        """Nothing is left to clean up."""
        self._tell(b"done\n")
        os.close(self._pipe)
        os.waitpid(self._pid, 0)

    def _tell(self, line: bytes) -> None:
        try:
            os.write(self._pipe, line)
        except BrokenPipeError:
            pass  # killed by somebody: the next start sweeps in its place


def _make_locked(path: str) -> int | None:
    """Make the directory and hold its lock; None where that cannot be."""
    try:
        os.mkdir(path, 0o700)
        place = os.path.join(path, _LOCK)
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        locks.lock(lock)
        # Between making and locking it, another launcher may have taken it for a dead one's.
        if locks.is_at(lock, place):
            return lock
        os.close(lock)
    except OSError:
        pass
    return None


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
        lock = locks.try_acquire(os.path.join(path, _LOCK), flags=os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return  # just being made, or already going
    if lock is None:
        return  # its launcher lives
    with suppress(OSError):
        _remove_tree(path)
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
