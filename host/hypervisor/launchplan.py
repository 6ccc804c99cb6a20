"""The launch plan: everything that a start needs, decided before anything is started.

Frozen and pure: the same request on the same capabilities gives the same plan; only
`apppot.host.launch` acts on it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from apppot.guest.protocol.job import Job
from apppot.host.confinement.sandbox import Shown


@dataclass(frozen=True)
class Disk:
    """A block device of the guest: its name in the view, and whether it is written."""

    view_name: str
    writable: bool = False
    backing: str | None = None  # UML copy-on-write: the view name of the file behind


@dataclass(frozen=True)
class KernelChoice:
    """The kernel to start and what it can do."""

    path: str
    release: str
    digest: str
    tuned: bool
    features: frozenset[str] = frozenset()
    lpj: int | None = None
    libraries: tuple[str, ...] = ()  # host paths that its process needs, where linked dynamically


@dataclass(frozen=True)
class LaunchPlan:
    """One start of one virtual machine."""

    kernel: KernelChoice
    memory: int  # bytes
    cpus: int
    huge: bool  # guest memory from the host's huge pages
    disks: tuple[Disk, ...]  # the first is the runtime, the second the config drive
    shown: tuple[Shown, ...]
    job: Job = field(compare=False)
    network: bool = False
    forwards: tuple[tuple[int, int], ...] = ()  # (host port, guest port), TCP
    confine: str = "auto"
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


def place_paths(job: Job, view: str) -> None:
    """Turn the view names in `job` into paths as the hypervisor's process sees them.

    Where directories are shared by tag, their names are the tags.
    """
    if job.share != "hostfs":
        return

    def placed(name: bytes) -> bytes:
        return os.fsencode(view) + b"/" + name

    for layer in job.layers:
        if layer.fstype == "hostfs":
            layer.source = placed(layer.source)
    for mount in job.mounts:
        mount.source = placed(mount.source)
    for entry in ("job_dir", "exchange", "modules"):
        name = getattr(job, entry)
        if name is not None:
            setattr(job, entry, placed(name))
