"""The config drives of clouds: NoCloud (label `cidata`) and OpenStack (label `config-2`).

A disk's label is read from its superblock, so that no udev is needed; the drive is mounted only
to read two files.
"""

from __future__ import annotations

import os

from apppot.guest import syscalls
from apppot.guest.console import log
from apppot.guest.payload import userdata
from apppot.guest.protocol.job import JobError
from apppot.guest.protocol.jsonlite import loads

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from apppot.guest.protocol.job import Job

_POINT = "/run/apppot/config"
# Label -> files of the job and of what the machine is called.
_KINDS = {
    "cidata": ("user-data", "meta-data"),
    "config-2": ("openstack/latest/user_data", "openstack/latest/meta_data.json"),
}
_SECTOR = 2048
_FLAGS = syscalls.MS_RDONLY | syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC


class Answer:
    """What a source gave: the job, and what the cloud calls this machine."""

    def __init__(self, source: str, job: Job, instance: str = "", hostname: str = "") -> None:
        self.source, self.job, self.instance = source, job, instance
        if hostname and job.hostname == type(job).hostname:
            job.hostname = hostname.split(".")[0]


def find(devices: Iterable[str]) -> Answer | None:
    """The answer of the first drive that holds a job, NoCloud's before OpenStack's.

    Raises JobError for user data that are no job.
    """
    labelled = [(label(device), device) for device in devices]
    for kind in _KINDS:
        for (name, fstype), device in labelled:
            if name == kind:
                found = _read(kind, device, fstype)
                if found is not None:
                    return found
    return None


def label(device: str) -> tuple[str, str]:
    """(label in lower case, file system) of a disk with ISO 9660 or FAT on it; else ("", "")."""
    try:
        with open(device, "rb") as disk:
            head = disk.read(512)
            disk.seek(16 * _SECTOR)
            volume = disk.read(_SECTOR)
    except OSError:  # an empty drive, a disk of no length
        return "", ""
    if volume[1:6] == b"CD001":
        return _text(volume[40:72]), "iso9660"
    for magic, place in ((54, 43), (82, 71)):  # FAT12 and 16, FAT32
        if head[magic : magic + 3] == b"FAT":
            return _text(head[place : place + 11]), "vfat"
    return "", ""


def _text(field: bytes) -> str:
    return field.decode("ascii", "replace").strip(" \0").lower()


def _read(kind: str, device: str, fstype: str) -> Answer | None:
    os.makedirs(_POINT, exist_ok=True)
    syscalls.mount(device, _POINT, fstype, _FLAGS)
    try:
        job_file, about_file = (f"{_POINT}/{name}" for name in _KINDS[kind])
        job = userdata.parse(_contents(job_file))
        about = facts(_contents(about_file))
    finally:
        syscalls.umount(_POINT)
    if job is None:
        log(f"{device} ({kind}) holds no user data")
        return None
    instance = about.get("instance-id") or about.get("uuid") or ""
    hostname = about.get("local-hostname") or about.get("hostname") or ""
    return Answer(kind, job, instance, hostname)


def _contents(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return b""


def facts(data: bytes) -> dict[str, str]:
    """The texts of a machine's metadata: JSON, or lines `name: value`."""
    text = data.decode("utf-8", "replace")
    if text.lstrip().startswith("{"):
        try:
            value: Any = loads(text)
        except ValueError as error:
            raise JobError(f"the machine's metadata are no JSON: {error}") from error
        return {key: item for key, item in value.items() if isinstance(item, str)}
    rows = [line.partition(":") for line in text.splitlines() if not line.startswith((" ", "#"))]
    return {key.strip(): item.strip().strip("\"'") for key, colon, item in rows if colon}
