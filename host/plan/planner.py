"""From a request to a launch plan.  Pure: reads nothing, starts nothing, decides everything."""

from __future__ import annotations

import os
from typing import Any

from apppot.guest.protocol.job import HOME, JOB_DIR, SEARCH_PATH, Job, Layer, Mount, Network
from apppot.host.common.errors import Unsuited, UsageError
from apppot.host.config.caller import Caller
from apppot.host.config.settings import Setting, Settings
from apppot.host.confinement.sandbox import Confinement, Method, Shown
from apppot.host.hypervisor.base import Share
from apppot.host.hypervisor.launchplan import (
    Disk,
    FileServer,
    KernelChoice,
    LaunchPlan,
    NetworkHelper,
    NetworkKind,
    shares,
)
from apppot.host.images.record import Image, Record
from apppot.host.plan.confinement import choose, confinement_wish
from apppot.host.plan.inherited import hidden_of_host, kept_environment
from apppot.host.plan.jobfiles import plan_files
from apppot.host.plan.request import Bind, Findings, Request

_LEAST_MEMORY = 64 << 20


def make_plan(request: Request, settings: Settings, caller: Caller, found: Findings) -> LaunchPlan:
    """The plan for `request`.  Raises UsageError for what cannot be had together."""
    memory = settings.memory.value
    if memory < _LEAST_MEMORY:
        raise UsageError(
            f"{memory >> 20} MiB of memory are too little for a guest", "ask for 64M or more: --mem"
        )
    confinement, helper_confinement = _confinement(settings, request, caller, found)
    network, network_helper, warnings = _network(settings.network, request, found)
    disks, shown, layers = _file_systems(request, hidden_of_host(caller.env), found)
    shown += [Shown("kernel", found.kernel.path), Shown("runtime", found.runtime)]
    if request.binds:
        _needs_share(found, "--bind")
    mounts = _binds(request.binds, shown)
    files = plan_files(request, settings.job_files, found)
    if files.copy and settings.job_files.value == "auto":
        warnings.append(
            f"{found.hypervisor.name} cannot show directories here: the job directory is copied, "
            "what is new in it comes back (--job-files copy says it is meant)"
        )
    if found.job_directory is not None and not files.copy:
        shown.append(Shown("job", found.job_directory, writable=True))
    if found.modules is not None:
        shown.append(Shown("modules", found.modules))
    mapped = confinement.kind is Confinement.BUBBLEWRAP
    job = _job(request, settings, caller, found, mapped=mapped)
    job.layers, job.mounts, job.network = layers, mounts, network
    job.outputs, job.follow = list(files.outputs), list(files.follow)
    if files.copy:
        job.job_dir, job.job_copy = None, True
    scratch = settings.scratch.value
    job.scratch = _writable_layer(request.session_disk, scratch, found, disks, shown)
    job.session = request.session_disk is not None
    if found.hypervisor.kernel == "uml":
        _check_cpus(settings.cpus, found.kernel)
    meant = settings.confine.value == "off" or not found.hypervisor.confinable
    if confinement.kind is Confinement.NONE and not meant:
        warnings.append(f"not confined: {found.capabilities.bwrap_reason}")
    return LaunchPlan(
        hypervisor=found.hypervisor,
        kernel=found.kernel,
        memory=memory,
        cpus=settings.cpus.value,
        huge=memory <= found.room.huge and memory % found.room.huge_page == 0,
        disks=tuple(disks),
        shown=tuple(shown),
        job=job,
        confinement=confinement,
        helper_confinement=helper_confinement,
        network_helper=network_helper,
        file_servers=_file_servers(job, shown, found),
        forwards=request.forwards,
        read_stdin=request.read_stdin,
        time_limit=settings.time.value,
        hello_timeout=settings.hello_timeout.value or found.hello_seconds,
        scratch=scratch,
        log=settings.log.value,
        warnings=tuple(warnings),
        extra=request.extra,
        xen_type=settings.xen_type.value,
        copied=found.job_directory if files.copy else None,
        inputs=request.inputs,
        returned=found.job_directory if files.come_back() else None,
    )


def _writable_layer(
    session_disk: str | None,
    scratch: int | None,
    found: Findings,
    disks: list[Disk],
    shown: list[Shown],
) -> bytes | None:
    """The guest's disk for what is written, added to `disks`; None: it is memory."""
    if session_disk is None and scratch is None:
        return None
    device = found.hypervisor.devices[len(disks)].encode()
    if session_disk is None:
        disks.append(Disk("run/scratch", writable=True))
        return device
    if scratch is not None:
        raise UsageError("a session has a disk of its own", "leave out --scratch")
    shown.append(Shown("session", session_disk, writable=True))
    disks.append(Disk("session", writable=True))
    return device


def _confinement(
    settings: Settings, request: Request, caller: Caller, found: Findings
) -> tuple[Method, Method]:
    """How the hypervisor's process is held, and how those beside it."""
    able, hypervisor = found.capabilities, found.hypervisor
    wish = confinement_wish(
        settings.confine.value,
        hypervisor,
        host_image=request.image is None,
        uid=caller.uid,
        landlock=able.landlock,
    )
    # They can be held where the hypervisor's own processes cannot.
    beside = wish if hypervisor.confinable else "auto"
    root = found.as_root
    return choose(wish, able, as_root=root), choose(beside, able, as_root=root)


def _file_servers(job: Job, shown: list[Shown], found: Findings) -> tuple[FileServer, ...]:
    """A server for each directory of the view that the guest mounts by virtiofs."""
    program = found.capabilities.virtiofsd
    if job.share != Share.VIRTIOFS or program is None:
        return ()
    tags = dict(shares(job, shown))
    return tuple(FileServer(program, item) for item in shown if item.tag in tags)


def _check_cpus(cpus: Setting[int], kernel: KernelChoice) -> None:
    if cpus.value > 1 and "ncpus" not in kernel.features:
        raise UsageError(
            f"{cpus.origin}: the kernel {kernel.release} runs guests with one CPU only",
            "build the pot's kernel: `apppot kernel build`",
        )


_MEANT = "--network none says it is meant"


def _network(
    setting: Setting[str], request: Request, found: Findings
) -> tuple[Network | None, NetworkHelper | None, list[str]]:
    """The guest's interface, what is to carry it, and warnings."""
    if setting.value == "none":
        if request.forwards:
            raise UsageError("--publish needs a network", "leave out --network none")
        return None, None, []
    if setting.value != "user":
        raise UsageError(f"{setting.origin}: unknown network {setting.value!r}", "user or none")
    device = found.hypervisor.network_device
    if device is None:
        if setting.origin == "default" and not request.forwards:
            return None, None, [f"no network: {found.hypervisor.name} has none here ({_MEANT})"]
        raise Unsuited(
            f"{found.hypervisor.name} has no network here", "use another hypervisor, or none"
        )
    able, by_descriptor = found.capabilities, found.hypervisor.network_by_descriptor
    if able.slirp is not None:
        helper = NetworkHelper(NetworkKind.SLIRP, able.slirp, by_descriptor)
        # Once the guest is connected, the helper is guarded, and takes orders.
        return Network(device=device, confirm=True), helper, []
    if able.qemu is not None and able.qemu_user_network and by_descriptor:
        helper = NetworkHelper(NetworkKind.QEMU, able.qemu, by_descriptor)
        return Network(device=device), helper, []
    if setting.origin == "default":
        return None, None, [f"no network: slirp4netns is not installed ({_MEANT})"]
    raise UsageError(
        f"{setting.origin}: slirp4netns is not installed",
        "install the package slirp4netns, or use --network none",
    )


def _file_systems(
    request: Request, hidden: tuple[str, ...], found: Findings
) -> tuple[list[Disk], list[Shown], list[Layer]]:
    """Disks, shown paths and layers: runtime, config drive, base image, changes."""
    disks = [Disk("runtime"), Disk("run/drive")]
    shown: list[Shown] = []
    layers: list[Layer] = []
    if request.cow is not None:
        if found.hypervisor.kernel != "uml":
            raise Unsuited(
                f"COW files are User-Mode Linux's own: {found.hypervisor.name} has none",
                "leave out --hypervisor, or use a session: apppot run --session NAME",
            )
        _add_cow(request.cow, found, disks, shown, layers)
    elif request.image is None:
        if not found.hypervisor.shows_root:
            raise Unsuited(
                "the image `host` is made of many file systems, which "
                f"{found.hypervisor.name} cannot show as one",
                "leave out --hypervisor, or use another image",
            )
        shown.append(Shown("host", "/", masked=hidden))
        share = _needs_share(found, "the image `host`")
        layers.append(Layer(source=b"host", fstype=share, hidden=list(hidden)))
    images = [*([request.image] if request.image is not None else []), *request.changes]
    for number, image in enumerate(images):
        device = found.hypervisor.devices[len(disks)]
        layers.append(_layer(image, device))
        shown.append(Shown(f"image{number}", image.path))
        disks.append(Disk(f"image{number}"))
    return disks, shown, layers


def _needs_share(found: Findings, what: str) -> str:
    """The file system for directories of the host.  Raises Unsuited where there is none."""
    if found.hypervisor.share is None:
        raise Unsuited(
            f"{what} shows directories of this host, which {found.hypervisor.name} cannot",
            "leave out --hypervisor, or bring the files in with the job directory",
        )
    return found.hypervisor.share


def _layer(image: Image, device: str) -> Layer:
    fstype = image.format.file_system
    return Layer(source=device.encode(), fstype=fstype, offset=image.probed.offset)


def _add_cow(
    pair: tuple[str, str, int],
    found: Findings,
    disks: list[Disk],
    shown: list[Shown],
    layers: list[Layer],
) -> None:
    cow, backing, offset = pair
    shown += [Shown("cow", cow, writable=True), Shown("backing", backing)]
    source = found.hypervisor.devices[len(disks)].encode()
    layers.append(Layer(source=source, fstype="ext4", offset=offset, writable=True))
    disks.append(Disk("cow", writable=True, backing="backing"))


def _binds(binds: tuple[Bind, ...], shown: list[Shown]) -> list[Mount]:
    mounts = []
    for number, bind in enumerate(binds):
        name = os.path.basename(bind.source.rstrip("/")) if bind.is_file else ""
        place = f"bind{number}"
        shown.append(
            Shown(f"{place}/{name}" if name else place, bind.source, writable=not bind.read_only)
        )
        mount = Mount(
            source=place.encode(),
            target=os.fsencode(bind.target),
            read_only=bind.read_only,
            name=os.fsencode(name),
        )
        mounts.append(mount)
    return mounts


def _job(
    request: Request, settings: Settings, caller: Caller, found: Findings, *, mapped: bool
) -> Job:
    record = request.image.record if request.image is not None else None
    env = kept_environment(caller.env)
    if record is not None:
        env.update({os.fsencode(k): os.fsencode(v) for k, v in record.env.items()})
    env.update(request.env or {})
    if request.tty:
        env.setdefault(b"TERM", b"linux")
    return Job(
        argv=_arguments(request, record),
        env=env,
        cwd=_directory(request, found),
        user=_user(settings.user, request, record),
        uid=caller.uid,
        gid=caller.gid,
        groups=_groups(caller, mapped=mapped),
        umask=caller.umask,
        rlimits=caller.rlimits,
        tty=request.tty,
        in_pot=request.in_pot,
        rows=found.rows,
        columns=found.columns,
        closed=[] if request.tty else _closed(caller, request),
        share=found.hypervisor.share or "none",
        job_dir=None if found.job_directory is None else b"job",
        exchange=b"exchange" if found.hypervisor.exchange else None,
        modules=None if found.modules is None else b"modules",
        hostname=settings.hostname.value,
        localtime=caller.localtime,
        search_path=_search_path(request, caller),
        run_scripts=request.run_scripts,
    )


def _arguments(request: Request, record: Record | None) -> list[bytes]:
    """The command, as docker composes it: the image's entrypoint, then the words given or its own.

    Empty: a login shell, or what the image's scripts say.
    """
    given = list(request.argv)
    if record is None or request.in_pot or request.shell or request.run_scripts:
        return given
    first = record.entrypoint if request.entrypoint is None else request.entrypoint
    # Another entrypoint does not understand the arguments of the image's own.
    own = record.command if request.entrypoint is None else ()
    return [os.fsencode(word) for word in first] + (given or [os.fsencode(w) for w in own])


def _user(setting: Setting[str], request: Request, record: Record | None) -> str:
    """Who runs the command: as asked, else as the image wants, else the caller."""
    wanted = record.user if record is not None and setting.origin == "default" else ""
    if wanted and not request.in_pot and not request.shell:
        return wanted
    return str(setting.value)


# Inside a user namespace, files of groups that are not mapped show this one (Linux's overflow
# id).  The guest's own check must let the caller's groups pass; the host makes the real one.
_OVERFLOW_ID = 65534


def _groups(caller: Caller, *, mapped: bool) -> list[list[Any]]:
    groups: list[list[Any]] = [[gid, name] for gid, name in caller.groups]
    if mapped and caller.uid != 0 and caller.groups:
        groups.append([_OVERFLOW_ID, "nogroup"])
    return groups


def _closed(caller: Caller, request: Request) -> list[int]:
    return [fd for fd in caller.closed if fd != 0 or request.read_stdin]


def _directory(request: Request, found: Findings) -> bytes | None:
    if request.in_pot:
        return b"/"
    if request.workdir is not None:
        start = JOB_DIR if found.job_directory is not None else HOME
        return os.fsencode(os.path.join(start, request.workdir))
    record = request.image.record if request.image is not None else None
    if record is not None and record.workdir and not request.shell:
        return os.fsencode(record.workdir)
    return None


def _search_path(request: Request, caller: Caller) -> bytes:
    """The guest's own, but for the host's root, where the caller's names the same programs."""
    if request.image is None and request.cow is None and b"PATH" in caller.env:
        return caller.env[b"PATH"]
    return SEARCH_PATH.encode()
