"""Random operations on the files of one directory, by processes on several sides of it.

Each operation is done by one process and ends before the next begins, so that there is one right
result for each: the one that processes of one machine would see.  The operations do not depend on
their results: the same seed gives the same ones, which is how two runs are compared.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.harness.vm import Who

_PROGRAM = Path(__file__).parent.parent / "vm" / "programs" / "fileops.py"
_DIRECTORIES = ("a", "b", "a/c")
_FILES = ("f", "g", "a/f", "a/g", "b/f", "a/c/f", "l", "b/l")
_SLOTS = range(3)
_ACCESS = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR)
_MORE = (0, 0, os.O_CREAT, os.O_CREAT, os.O_APPEND, os.O_TRUNC, os.O_CREAT | os.O_EXCL)
_SIZES = (0, 1, 100, 4095, 4096, 5000, 20000, 70000)
_WHOLE = 1 << 20

Order = tuple[Any, ...]


class Side:
    """Processes on one side: those of `process`, which executes `command`, here or in its guest."""

    def __init__(self, process: subprocess.Popen[bytes], workers: int) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.workers = workers
        self._orders, self._answers = process.stdin, process.stdout.fileno()
        self.release = _line(self._answers).decode().strip()

    def do(self, worker: int, order: Order) -> Any:
        """What one of them finds when it does that."""
        self._orders.write(json.dumps((worker, *order)).encode() + b"\n")
        return json.loads(_line(self._answers))


def command(workers: int) -> tuple[str, ...]:
    """What starts so many processes, wherever Python is; their directory stays as it is."""
    return ("python3", "-c", _PROGRAM.read_text(), str(workers))


def native(directory: Path, workers: int, who: Who) -> subprocess.Popen[bytes]:
    """Processes of this machine."""
    other = os.getuid() != who.uid
    return subprocess.Popen(
        command(workers),
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        user=who.uid if other else None,
        group=who.gid if other else None,
        extra_groups=[] if other else None,
    )


def _line(fd: int) -> bytes:
    text = bytearray()
    while not text.endswith(b"\n"):
        piece = os.read(fd, 1 << 16)
        assert piece, f"it ended after {bytes(text)!r}"
        text += piece
    return bytes(text)


def _name(choose: random.Random) -> str:
    return choose.choice(_FILES + _DIRECTORIES if choose.random() < 0.2 else _FILES)


def _record(choose: random.Random) -> tuple[str, int, int]:
    kind = choose.choice(("read", "write", "write", "none", "none"))
    return kind, choose.randrange(0, 40, 10), choose.choice((0, 5, 10, 20))


def _order(choose: random.Random) -> Order:
    """One operation, whether or not it can be done as things are."""
    name, other, slot = _name(choose), _name(choose), choose.choice(_SLOTS)
    text, size = choose.choice("abcdefgh"), choose.choice(_SIZES)
    offset = choose.choice((0, 10, 4090, 9000, 50000))
    flags = choose.choice(_ACCESS) | choose.choice(_MORE)
    file = choose.choice(_FILES)
    orders: tuple[tuple[int, Order], ...] = (
        (9, ("open", slot, file, flags, 0o666)),
        (9, ("open", slot, file, flags | os.O_CREAT, 0o666)),
        (2, ("open", slot, choose.choice(_DIRECTORIES), os.O_RDONLY | os.O_DIRECTORY, 0)),
        (1, ("open", slot, choose.choice((".", *_DIRECTORIES)), os.O_RDWR | os.O_TMPFILE, 0o640)),
        (2, ("close", slot)),
        (1, ("name", slot, file)),
        (2, ("reopen", slot, choose.choice(_SLOTS), choose.choice(_ACCESS))),
        (8, ("write", slot, text, size)),
        (4, ("pwrite", slot, text, size, offset)),
        (6, ("read", slot, size)),
        (4, ("pread", slot, size, offset)),
        (3, ("lseek", slot, choose.choice((0, 5, 5000)), choose.choice((0, 1, 2, 3, 4)))),
        (2, ("ftruncate", slot, offset)),
        (2, ("truncate", file, offset)),
        (2, ("fallocate", slot, offset, 1 + size)),
        (2, ("copy", slot, (slot + 1) % len(_SLOTS), 1 + size)),
        (1, ("fsync", slot)),
        (6, ("contents", file)),
        (6, ("stat", name)),
        (2, ("lstat", name)),
        (6, ("fstat", slot)),
        (3, ("is", slot, name)),
        (4, ("list", choose.choice((".", *_DIRECTORIES)))),
        (1, ("types", choose.choice((".", *_DIRECTORIES)))),
        (2, ("entries", slot)),
        (6, ("mkdir", choose.choice(_DIRECTORIES), 0o755)),
        (1, ("rmdir", choose.choice(_DIRECTORIES))),
        (3, ("unlink", name)),
        (5, ("rename", name, other)),
        (2, ("link", name, other)),
        (1, ("symlink", choose.choice(("f", "../f", "nowhere", "a")), name)),
        (1, ("readlink", name)),
        (2, ("chmod", name, choose.choice((0o600, 0o644, 0o755, 0o444, 0o711)))),
        (1, ("fchmod", slot, choose.choice((0o600, 0o640)))),
        (2, ("utime", name, 1_000_000_000 * 10**9 + choose.randrange(10**9))),
        (2, ("access", name, choose.choice((os.R_OK, os.W_OK, os.X_OK)))),
        (2, ("setxattr", name, choose.choice("xyz"), text)),
        (1, ("removexattr", name, choose.choice("xyz"))),
        (2, ("xattrs", name)),
        (1, ("chdir", choose.choice((*_DIRECTORIES, "..")))),
        (2, ("back",)),
        (1, ("here",)),
        (3, ("mapped", slot)),
        (3, ("map_write", slot, text * 50, offset)),
        (3, ("flock", slot, choose.choice(("read", "write", "none")))),
        (3, ("lock", slot, *_record(choose))),
        (3, ("file_lock", slot, *_record(choose))),
        (2, ("get_lock", slot, choose.choice(("read", "write")), 0, _WHOLE)),
        (1, ("get_file_lock", slot, choose.choice(("read", "write")), 0, _WHOLE)),
    )
    weights = [weight for weight, _ in orders]
    return choose.choices([order for _, order in orders], weights)[0]


def orders(seed: int, workers: int) -> Iterator[tuple[int, Order]]:
    """Without end: which of so many processes does what."""
    choose = random.Random(seed)
    for name in _DIRECTORIES:
        yield 0, ("mkdir", name, 0o755)
    while True:
        yield choose.randrange(workers), _order(choose)


def first_difference(
    sides: Sequence[Side], reference: Side, seed: int, enough: Callable[[int], bool]
) -> tuple[int, str | None]:
    """Do the same on `sides` and in one process after another of `reference`.

    How many operations were done, and the first that had another result, with those before it.
    """
    places = [(side, worker) for side in sides for worker in range(side.workers)]
    assert reference.workers == len(places)
    done: list[str] = []
    for count, (number, order) in enumerate(orders(seed, len(places))):
        if enough(count):
            return count, None
        side, worker = places[number]
        found, right = side.do(worker, order), reference.do(number, order)
        done.append(f"{number} on {side.release}: {order} -> {_short(right)}")
        if found != right:
            before = "\n".join(done[-40:])
            return count, f"seed {seed}: {_short(found)} instead of the last:\n{before}"
    raise AssertionError("there is always one more")


def _short(result: object) -> str:
    text = json.dumps(result)
    return text if len(text) < 300 else f"{text[:140]} … {text[-140:]} ({len(text)} characters)"
