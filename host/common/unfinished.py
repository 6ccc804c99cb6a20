"""Work that is not whole yet: under a hidden name, locked while its maker lives.

Beside the work `.NAME.<random>` lies `.NAME.<random>.lock`, which is made first and goes last.  So
what has no lock that somebody holds is what a killed process left, whichever host or PID namespace
it was in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from apppot.host.common import locks
from apppot.host.common.files import listdir

_LOCK = ".lock"
_DIGITS = frozenset("0123456789abcdef")


@contextmanager
def making(folder: str, name: str) -> Iterator[str]:
    """A path in `folder`, with nothing there yet; what lies there afterwards goes.

    The caller renames what is to stay.  A file system without locks has none here, and what is
    left there is never swept.  Raises OSError where `folder` cannot be written.
    """
    path = os.path.join(folder, f".{name}.{os.urandom(8).hex()}")
    lock = _locked(path + _LOCK)
    try:
        yield path
    finally:
        with suppress(OSError):  # what cannot go now keeps its lock file, to be swept
            _remove(path)
            os.unlink(path + _LOCK)
        os.close(lock)


def _locked(path: str) -> int:
    try:
        return locks.acquire(path)
    except OSError:
        return os.open(path, locks.FLAGS | os.O_CLOEXEC, 0o600)


def sweep(folder: str, name: str) -> None:
    """Remove what killed makers of `name` have left in `folder`."""
    prefix = f".{name}."
    for entry in listdir(folder):
        word = entry.removeprefix(prefix).removesuffix(_LOCK)
        # All else that begins so is somebody else's.
        if entry == f"{prefix}{word}{_LOCK}" and len(word) == 16 and set(word) <= _DIGITS:
            with suppress(OSError):  # no locks here, not ours, or just going
                _sweep_one(os.path.join(folder, prefix + word))


def _sweep_one(path: str) -> None:
    lock = locks.try_acquire(path + _LOCK, flags=os.O_RDWR)
    if lock is None:
        return  # its maker lives
    try:
        _remove(path)
        os.unlink(path + _LOCK)
    finally:
        os.close(lock)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        import shutil  # takes the launcher milliseconds

        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)
