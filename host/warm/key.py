"""Which kept machine a run may resume from: everything that the boot up to there has consumed."""

from __future__ import annotations

import json
import os
import re
from hashlib import sha256

from apppot.guest.protocol.job import Job, Network
from apppot.host.hypervisor.base import Descriptors
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.plan.request import Request

# Of how machines are kept: raise it where older ones must not be taken.
_VERSION = 1

# What of a job the boot steps read before a machine is kept (guest/init/main.py, STEPS).
EARLY = frozenset(
    (
        *("uid", "gid", "groups", "layers", "scratch", "session", "in_pot", "mounts", "share"),
        *("job_dir", "job_copy", "exchange", "modules", "network", "hostname", "localtime", "warm"),
    )
)
# What is read only after WAKE, which brings the job again.
LATE = frozenset(
    (
        *("argv", "env", "cwd", "user", "umask", "rlimits", "tty", "rows", "columns", "closed"),
        *("search_path", "run_scripts", "outputs", "follow", "script", "report"),
    )
)


def obstacle(plan: LaunchPlan) -> str:
    """Why a run of this plan cannot resume from a kept machine; empty where it can."""
    job, hypervisor = plan.job, plan.hypervisor
    if not hypervisor.monitored:
        return f"{hypervisor.name} keeps no machines"
    if plan.huge:
        return "its memory lies in huge pages"
    if any(disk.writable for disk in plan.disks):
        return "it has a disk that is written to"
    if any(layer.fstype == job.share for layer in job.layers):
        return "a directory of this host is its root"
    if job.job_copy:
        return "its job directory is a copy, on a disk of its own size"
    if job.in_pot:
        return "it runs in the pot"
    if not plan.kernel.tuned:
        return "its kernel is not the pot's"
    return ""


def early_job(job: Job) -> Job:
    """The job of a machine that is to be kept: nothing in it of what its runs are to do."""
    early = Job(**{name: getattr(job, name) for name in EARLY - {"warm"}}, warm=True)
    if early.network is not None:
        # The boot reads its name server only; the interface comes up after GO.
        early.network = Network(dns=early.network.dns)
    return early


def key(plan: LaunchPlan, request: Request) -> str:
    """The name of the kept machine that serves this plan (64 hex digits)."""
    inherited = Descriptors(3, 4 if plan.network_helper is not None else None, 5)
    argv = plan.hypervisor.argv(plan, "/view", "/tmp", inherited)
    # Measured anew at each boot of the host, never quite the same.
    argv = [re.sub(r"\btsc_early_khz=\d+", "", word) for word in argv]
    images = [*([request.image] if request.image is not None else []), *request.changes]
    consumed = {
        "version": _VERSION,
        "argv": argv,
        "program": _identity(argv[0]),
        "kernel": plan.kernel.digest,
        "runtime": [_identity(item.source) for item in plan.shown if item.name == "runtime"],
        "images": [image.digest or _identity(image.path) for image in images],
        "cpu": host_cpu(),
        "host": os.uname().release,
        "job": early_job(plan.job).to_json(),
    }
    return sha256(json.dumps(consumed, sort_keys=True).encode()).hexdigest()


def _identity(path: str) -> list[int | str]:
    """What changes with a file's contents; to read them would take longer than a boot."""
    found = os.stat(path)
    return [os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns]


# Lines of /proc/cpuinfo that a guest may see the difference of.
_CPU_LINES = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")


def host_cpu(path: str = "/proc/cpuinfo") -> list[str]:
    """The model and abilities of the host's first processor."""
    with open(path, encoding="utf-8", errors="replace") as text:
        found = []
        for line in text:
            if not line.strip():
                break
            if line.partition(":")[0].strip() in _CPU_LINES:
                found.append(line.strip())
    return found
