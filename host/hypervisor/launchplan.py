"""The launch plan: everything that a start needs, decided before anything is started.

Frozen and pure: the same request on the same capabilities gives the same plan; only
`apppot.host.machine` acts on it, and needs nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import field
from enum import StrEnum
from typing import TYPE_CHECKING

from apppot.guest.protocol.job import Job, changed
from apppot.host.common.frozen import frozen
from apppot.host.confinement.sandbox import Confinement, Method, Shown
from apppot.host.hypervisor.base import Share

if TYPE_CHECKING:
    from apppot.host.hypervisor.base import Hypervisor


@frozen
class Disk:
    """A block device of the guest: its name in the view, and whether it is written."""

    view_name: str
    writable: bool = False
    backing: str | None = None  # UML copy-on-write: the view name of the file behind


@frozen
class KernelChoice:
    """The kernel to start and what it can do."""

    path: str
    release: str
    digest: str
    tuned: bool
    features: frozenset[str] = frozenset()
    lpj: int | None = None
    libraries: tuple[str, ...] = ()  # host paths that its process needs, where linked dynamically


class NetworkKind(StrEnum):
    """What speaks TCP/IP for a guest."""

    SLIRP = "slirp4netns"
    QEMU = "qemu"  # its user network, in a process of its own


@frozen
class NetworkHelper:
    """The process that is a guest's way out."""

    kind: NetworkKind
    program: str
    by_descriptor: bool  # the hypervisor inherits its end of the connection; else it connects


@frozen
class FileServer:
    """A process that serves one shown directory to the guest."""

    program: str
    shown: Shown


@frozen
class LaunchPlan:
    """One start of one virtual machine."""

    hypervisor: Hypervisor
    kernel: KernelChoice
    memory: int  # bytes
    cpus: int
    huge: bool  # guest memory from the host's huge pages
    disks: tuple[Disk, ...]  # the first is the runtime, the second the config drive
    shown: tuple[Shown, ...]
    job: Job = field(compare=False)
    confinement: Method = Method(Confinement.NONE)  # of the hypervisor's process
    helper_confinement: Method = Method(Confinement.NONE)  # of the processes beside it
    network_helper: NetworkHelper | None = None
    file_servers: tuple[FileServer, ...] = ()
    forwards: tuple[tuple[int, int], ...] = ()  # (host port, guest port), TCP
    read_stdin: bool = True
    time_limit: float | None = None  # seconds
    hello_timeout: float = 60.0  # seconds
    scratch: int | None = None  # bytes of a disk for the writable layer
    log: str | None = None  # file that gets the guest's console
    warnings: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()  # more words for the kernel's command line
    xen_type: str = "pv"  # how a domain of Xen is virtualised: pv or pvh
    copied: str | None = None  # directory whose files the guest gets a copy of, on the config drive
    inputs: tuple[str, ...] = ()  # patterns of those that it gets; none: all
    returned: str | None = None  # directory that gets what comes back; None: nothing does

    @property
    def shown_itself(self) -> tuple[Shown, ...]:
        """What the machine's own process sees: nothing of what file servers serve."""
        served = {server.shown.tag for server in self.file_servers}
        return tuple(item for item in self.shown if item.tag not in served)


def placed(job: Job, view: str) -> Job:
    """`job` with the view's names turned into paths as the hypervisor's process sees them.

    Where directories are shared by tag, their names are the tags, and stay.
    """
    if job.share != Share.HOSTFS:
        return job

    def path(name: bytes) -> bytes:
        return os.fsencode(view) + b"/" + name

    def of(name: bytes | None) -> bytes | None:
        return None if name is None else path(name)

    layers = [
        changed(layer, source=path(layer.source)) if layer.fstype == Share.HOSTFS else layer
        for layer in job.layers
    ]
    description: Job = changed(
        job,
        layers=layers,
        mounts=[changed(mount, source=path(mount.source)) for mount in job.mounts],
        job_dir=of(job.job_dir),
        exchange=of(job.exchange),
        modules=of(job.modules),
    )
    return description


def shares(job: Job, shown: Iterable[Shown]) -> list[tuple[str, bool]]:
    """The directories of a view that the guest mounts: tag, and whether it may write."""
    names = [mount.source for mount in job.mounts]
    names += [layer.source for layer in job.layers if layer.fstype == job.share]
    names += [job.job_dir] if job.job_dir is not None else []
    wanted = {os.fsdecode(name) for name in names}
    writable = {item.tag: item.writable for item in shown}
    return [(name, writable[name]) for name in sorted(wanted)]
