"""What a guest without a launcher finds around it: its disk's layers, a network, its job."""

from __future__ import annotations

import os

from apppot.guest import syscalls
from apppot.guest.console import log
from apppot.guest.init import dhcp, network
from apppot.guest.payload import configdrive, sources
from apppot.guest.payload.configdrive import Answer
from apppot.guest.protocol.drive import DISK_MEMBER, read_job
from apppot.guest.protocol.job import JOB_DIR, Job, Network

# The partition that describes the disk.
DISK_PARTITION = "apppot-disk"


def find(line: sources.CommandLine, named: Job | None) -> tuple[Answer, dhcp.Lease | None]:
    """The job of this guest, and the network that is up for it.

    `named` is what the command line or a drive of ours says.  Raises JobError, OSError.
    """
    if not os.path.ismount("/sys"):
        syscalls.mount("sysfs", "/sys", "sysfs", syscalls.MS_NOSUID | syscalls.MS_NODEV)
    answer, lease = _answer(named)
    job = answer.job
    if sources.DISK_WORD in line.words:
        _use_disk(job)
    if lease is not None:
        job.network = _described(lease)
        _resolve_names(job.network)
    log(f"job from {answer.source}, host name {job.hostname}")
    return answer, lease


def _answer(named: Job | None) -> tuple[Answer, dhcp.Lease | None]:
    if named is not None:
        lease = dhcp.acquire() if named.network is None else None
        return Answer("command line or drive", _placed(named)), lease
    found = configdrive.find(sources.block_devices())
    lease = dhcp.acquire()
    if found is None and lease is not None:
        from apppot.guest.payload import metadata

        found = metadata.find()
    if found is None:
        return Answer("the image", Job(run_scripts=True)), lease
    return Answer(found.source, _placed(found.job), found.instance), lease


def _placed(job: Job) -> Job:
    """The job, in a directory of its own; the original's words and the scripts start at home."""
    if job.cwd is None and job.job_dir is None and not job.run_scripts:
        job.cwd = JOB_DIR.encode()
    return job


def _use_disk(job: Job) -> None:
    """Give the job the layers and the environment of the disk that this root is on."""
    partitions = _partitions()
    disk = Job.load(read_job(_device(partitions, DISK_PARTITION), DISK_MEMBER))
    for layer in disk.layers:
        layer.source = _device(partitions, os.fsdecode(layer.source)).encode()
    job.layers = [*disk.layers, *job.layers]  # the job may bring changes
    job.env = {**disk.env, **job.env}
    if disk.scratch is not None and job.scratch is None:
        job.scratch = _device(partitions, os.fsdecode(disk.scratch)).encode()


def _device(partitions: dict[str, str], name: str) -> str:
    if name not in partitions:
        raise OSError(f"the disk has no partition {name}; it has {', '.join(partitions)}")
    return partitions[name]


def _partitions() -> dict[str, str]:
    """The partitions of the root's own disk: name in its table -> device.

    Another disk may have the same names.
    """
    device = os.stat("/").st_dev
    own = os.path.realpath(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    found = {}
    for name in os.listdir(os.path.dirname(own)):
        try:
            with open(f"{os.path.dirname(own)}/{name}/uevent", encoding="utf-8") as text:
                words = dict([line.rstrip("\n").partition("=")[::2] for line in text])
        except (FileNotFoundError, NotADirectoryError):
            continue
        if "PARTNAME" in words:
            found[words["PARTNAME"]] = f"/dev/{words['DEVNAME']}"
    return found


def _described(lease: dhcp.Lease) -> Network:
    return Network(
        device=lease.device,
        address=lease.address,
        prefix=lease.prefix,
        dns=" ".join(lease.servers),
    )


def _resolve_names(known: Network) -> None:
    """Let the agent itself resolve names: its own root is read-only."""
    text = "/run/apppot/resolv.conf"
    with open(text, "w", encoding="ascii") as file:
        file.write(network.resolver(known))
    try:
        syscalls.mount(text, os.path.realpath("/etc/resolv.conf"), None, syscalls.MS_BIND)
    except OSError as error:
        log(f"the agent resolves no names: {error}")
