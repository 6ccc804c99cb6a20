"""Kept machines: a folder for each, of its user only, that appears whole or not at all.

What a killed launcher left of one is swept by the next that keeps or lists.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from apppot.host.common import unfinished
from apppot.host.common.files import read_json, sync, write_all, write_json
from apppot.host.common.frozen import frozen
from apppot.host.common.paths import cache_home
from apppot.host.common.units import timestamp
from apppot.host.warm import stub
from apppot.host.warm.memory import Extents, pack

_VERSION = 1
# Machines that are kept; of more, those go that were used longest ago.
MOST = 8
_MAKING, _GONE = "making", "gone"
_RECORD, _MEMORY, _DEVICES, _STUB = "machine.json", "memory", "devices", "stub"


@frozen
class Kept:
    """A kept machine: what it was made for, and its files."""

    key: str
    folder: str
    image: str
    hypervisor: str
    memory: int  # bytes
    cpus: int
    created: str
    extents: Extents

    @property
    def memory_file(self) -> str:
        return os.path.join(self.folder, _MEMORY)

    @property
    def device_file(self) -> str:
        return os.path.join(self.folder, _DEVICES)

    @property
    def stub(self) -> str:
        """What stands in for its kernel."""
        return os.path.join(self.folder, _STUB)

    def size(self) -> int:
        """Bytes on the disk."""
        return sum(os.stat(path).st_size for path in (self.memory_file, self.device_file))

    def used(self) -> float:
        """When a run last resumed from it, or it was made (seconds since 1970)."""
        return os.stat(os.path.join(self.folder, _RECORD)).st_mtime

    def touch(self) -> None:
        """Note that it is used now."""
        with suppress(OSError):  # a store that cannot be written to keeps no order
            os.utime(os.path.join(self.folder, _RECORD))


def home() -> str:
    """Where the user's kept machines lie."""
    return os.path.join(cache_home(), "warm")


def find(key: str) -> Kept | None:
    """The kept machine of that name; None where there is none, or its record is damaged."""
    folder = os.path.join(home(), key)
    value = read_json(os.path.join(folder, _RECORD), _VERSION)
    if value is None:
        return None
    try:
        extents = [(int(at), int(length)) for at, length in value["extents"]]
        return Kept(
            key,
            folder,
            str(value["image"]),
            str(value["hypervisor"]),
            int(str(value["memory"])),
            int(str(value["cpus"])),
            str(value["created"]),
            extents,
        )
    except (KeyError, TypeError, ValueError):
        return None


def machines() -> list[Kept]:
    """All kept machines, the one used last first."""
    try:
        names = [name for name in os.listdir(home()) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    found = [machine for name in names if (machine := find(name)) is not None]
    return sorted(found, key=lambda machine: -machine.used())


def keep(key: str, facts: Mapping[str, object], memory: int, devices: bytes) -> Kept:
    """Keep a machine that stands still: its memory, a file, and its devices' state.

    `facts` are the fields of `Kept` that describe it.  Raises OSError.
    """
    os.makedirs(home(), mode=0o700, exist_ok=True)
    sweep()
    with _making() as making:
        with _file(making, _MEMORY) as file:
            extents = pack(memory, file)
        with _file(making, _DEVICES) as file:
            write_all(file, devices)
        with _file(making, _STUB) as file:
            write_all(file, stub.kernel())
        record = {**facts, "created": timestamp(), "extents": extents}
        write_json(os.path.join(making, _RECORD), record, 0o400, version=_VERSION)
        folder = os.path.join(home(), key)
        _remove(folder)
        os.rename(making, folder)
        sync(home())
    for machine in machines()[MOST:]:
        remove(machine)
    found = find(key)
    assert found is not None
    return found


@contextmanager
def _making() -> Iterator[str]:
    """A folder for what is not whole yet; removed where it was not renamed."""
    with unfinished.making(home(), _MAKING) as path:
        os.mkdir(path, 0o700)
        yield path


@contextmanager
def _file(folder: str, name: str) -> Iterator[int]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(os.path.join(folder, name), flags, 0o400)
    try:
        yield fd
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(machine: Kept) -> None:
    """Delete it; a run that has just begun to resume from it goes on."""
    _remove(machine.folder)


def sweep() -> None:
    """Remove what killed launchers left half-made."""
    for name in (_MAKING, _GONE):
        unfinished.sweep(home(), name)


def _remove(folder: str) -> None:
    """Remove a machine's folder: first its name, so that nobody finds half of it."""
    with unfinished.making(home(), _GONE) as doomed, suppress(FileNotFoundError):  # gone already
        os.rename(folder, doomed)
