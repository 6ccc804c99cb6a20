"""PID 1 of the guest: an ordered list of named, timed steps from power-on to power-off.

Import budget: os, time, struct, select, fcntl, termios, resource and this package; nothing that
pulls in `re`, `enum`, `typing` or `socket` (a test holds it).
"""

from __future__ import annotations

import time

STARTED = time.clock_gettime(time.CLOCK_BOOTTIME)

import os  # noqa: E402
from binascii import a2b_base64  # noqa: E402

from apppot.guest import shares, syscalls  # noqa: E402
from apppot.guest.console import log  # noqa: E402
from apppot.guest.init import account, mounts, network  # noqa: E402
from apppot.guest.merge import root, scratch  # noqa: E402
from apppot.guest.payload import process, session, sources  # noqa: E402
from apppot.guest.payload.channel import Channel, ChannelLost, open_channel  # noqa: E402
from apppot.guest.payload.streams import EXCHANGE  # noqa: E402
from apppot.guest.protocol import frames  # noqa: E402
from apppot.guest.protocol.job import Job, Layer  # noqa: E402
from apppot.guest.protocol.jsonlite import dumps, loads  # noqa: E402

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Steps = tuple[tuple[str, Callable[["Boot"], None]], ...]

    from apppot.guest.init.standalone import Standalone
    from apppot.guest.payload import outputs

_MODULES = "/run/apppot/modules"
_OWN_ROOT = Layer(source=b"/", fstype="bind")


class Boot:
    """What the steps leave for each other."""

    def __init__(self) -> None:
        self.timeline: list[tuple[str, float]] = [("python", STARTED)]
        self.line = sources.CommandLine(b"")
        self.job = Job()
        self.session: session.Session | None = None
        self.standalone: Standalone | None = None  # where there is no launcher
        self.points: list[str] = []
        self.in_place = False  # the image itself is written to
        self.resumed = False  # this machine was kept and has been woken
        self.step = "start"

    def mark(self, name: str) -> None:
        """Note that `name` is done now, in seconds since power-on."""
        self.timeline.append((name, time.clock_gettime(time.CLOCK_BOOTTIME)))


def _kernel_file_systems(boot: Boot) -> None:
    mounts.mount_pot()
    boot.line = sources.CommandLine.of_this_kernel()


def _channel(boot: Boot) -> None:
    device = boot.line.channel()
    if device is not None:
        boot.session = session.Session(Channel(open_channel(device)))


def _job(boot: Boot) -> None:
    named = sources.find_job(boot.line)
    if boot.session is not None:
        boot.job = named or Job(run_scripts=True)
        return
    from apppot.guest.init.standalone import Standalone

    boot.standalone = Standalone(boot.line, named)
    boot.job = boot.standalone.job


def _modules(boot: Boot) -> None:
    tree = None
    if boot.job.modules is not None:
        os.mkdir(_MODULES)
        syscalls.mount("modules", _MODULES, "hostfs", syscalls.MS_RDONLY, boot.job.modules)
        tree = _MODULES
    root.ensure_file_systems(tree, loop=any(layer.offset for layer in boot.job.layers))


def _layers(boot: Boot) -> None:
    # Without a base image this root is one: an image that carries the agent itself.
    layers = boot.job.layers if _has_base(boot) else [_OWN_ROOT, *boot.job.layers]
    boot.points = root.mount_layers(layers)
    # Only a single image can be written to in place: over one with changes lies a merge.
    boot.in_place = len(layers) == 1 and _writable(boot.points[0], layers[0])
    if boot.job.uid and not boot.job.in_pot:
        pairs = zip(boot.points, layers)
        images = [point for point, layer in pairs if layer.fstype not in shares.KINDS]
        root.map_owner(images, boot.job.uid, boot.job.gid)


def _has_base(boot: Boot) -> bool:
    words = boot.line.words
    return bool(boot.job.layers) and ("apppot.drive" in words or sources.DISK_WORD in words)


def _writable(point: str, layer: Layer) -> bool:
    """Whether changes go into the image itself: asked for, or this root was mounted `rw`."""
    own = layer.fstype == "bind" and not os.statvfs(point).f_flag & os.ST_RDONLY
    return layer.writable or own


def _scratch(boot: Boot) -> None:
    if not boot.in_place:
        scratch.mount(boot.job)


def _generated(boot: Boot) -> None:
    if not boot.job.session:
        account.generate(boot.job, boot.points)
        return
    # What the session holds is the image's own now: it may have accounts of its own.
    account.generate(boot.job, [*boot.points, scratch.UPPER])
    scratch.refresh(root.GENERATED)


def _merge(boot: Boot) -> None:
    if boot.in_place:
        from apppot.guest.init import inplace

        root.use_in_place(boot.points[0])
        inplace.install(root.GENERATED, root.ROOT)
        inplace.supply(root.SUPPLY, root.ROOT)
        mounts.mount_guest()
        return
    root.merge(boot.points, scratch.POINT)
    mounts.mount_guest()


def _host_name(boot: Boot) -> None:
    with open("/proc/sys/kernel/hostname", "w", encoding="utf-8") as name:
        name.write(boot.job.hostname)


def _loopback(boot: Boot) -> None:
    network.loopback()


def _machine_id(boot: Boot) -> None:
    # What is written to is the image's own, and may be about to replace the file.
    if not boot.in_place and not boot.job.session:
        account.lend_machine_id()


def _host_directories(boot: Boot) -> None:
    if boot.job.job_copy:
        from apppot.guest.payload import inputs

        inputs.mount(boot.job, boot.in_place)
    mounts.mount_host_directories(boot.job)
    if boot.job.exchange is not None:
        os.mkdir(EXCHANGE)
        shares.mount(boot.job.share, boot.job.exchange, EXCHANGE, syscalls.MS_RDONLY)


# In this order: each step may use what the ones before it left.
STEPS: Steps = (
    ("kernel file systems", _kernel_file_systems),
    ("channel", _channel),
    ("job", _job),
    ("modules", _modules),
    ("layers", _layers),
    ("scratch", _scratch),
    # Before the merge: what is generated is one of its layers.
    ("generated files", _generated),
    ("merge", _merge),
    ("host name", _host_name),
    ("loopback", _loopback),
)
# What is left to a machine that was kept when it is woken, with the job that wakes it.
LAST_STEPS: Steps = (
    ("machine id", _machine_id),
    ("host directories", _host_directories),
)


def _boot(boot: Boot) -> None:
    _take(boot, STEPS)
    if boot.job.warm and boot.session is not None:
        _sleep(boot, boot.session)
    _take(boot, LAST_STEPS)


def _take(boot: Boot, steps: Steps) -> None:
    for name, step in steps:
        boot.step = name
        step(boot)
        boot.mark(name)


def _sleep(boot: Boot, served: session.Session) -> None:
    """Say HELLO, to be kept as this machine is now; return in each machine that resumes."""
    from apppot.guest.init import readahead

    boot.step = "read ahead"
    readahead.read(boot.points)
    boot.mark(boot.step)
    served.channel.greet(_hello(boot))
    boot.step = "wait for WAKE"
    description, said = served.wait_for_wake()
    boot.timeline.clear()
    boot.mark("resume")
    boot.step = "wake"
    message: Any = loads(said.decode())
    # Before anything asks for a random number: until now, all that resume are the same.
    syscalls.reseed(a2b_base64(message["entropy"]))
    boot.job = Job.load(description)
    boot.resumed = True
    boot.mark("wake")


def _set_clock(said: bytes) -> None:
    """Set the clock, which stood still while this machine was kept, to what GO says."""
    message: Any = loads(said.decode())
    time.clock_settime(time.CLOCK_REALTIME, message["time"])


def _hello(boot: Boot) -> bytes:
    uname = os.uname()
    hello = {
        "version": frames.VERSION,
        "release": uname.release,
        "machine": uname.machine,
        "resumed": boot.resumed,
        "timeline": [[name, round(at, 6)] for name, at in boot.timeline],
    }
    return dumps(hello).encode()


def _serve(boot: Boot, served: session.Session) -> None:
    """With a launcher: handshake, payload, EXIT."""
    served.channel.greet(_hello(boot))
    boot.step = "wait for GO"
    said = served.wait_for_go()
    if boot.resumed:
        boot.step = "clock"
        _set_clock(said)
    if boot.job.network is not None:
        boot.step = "network"
        network.bring_up(boot.job.network)
        if boot.job.network.confirm:
            served.channel.send(frames.NETWORK_UP, payload=b"{}")
            served.wait_for_go()
    files = _job_files(boot, served)
    boot.step = "payload"
    watched = scratch.watch() if boot.job.session else None
    argv, place = _command(boot), "" if boot.job.in_pot else root.ROOT
    who = process.find_account(boot.job, place)
    started = process.start(boot.job, who, argv, place)
    if files is not None:
        files.watch()

    def join(description: bytes, pid: int) -> tuple[process.Payload, bool]:
        job = Job.load(description)
        who = process.find_account(job, place)
        return process.start(job, who, job.argv, place, pid), job.tty

    report = served.run(started, boot.job.tty, join)
    boot.step = "outputs"
    if files is not None:
        report["outputs"] = served.return_files(files)
    if boot.in_place:
        root.release(boot.points)
    elif watched is not None:
        _forget_job_files(boot.job)
        try:
            scratch.settle(watched)
        finally:
            root.release([scratch.POINT])
    os.sync()
    served.channel.send(frames.EXIT, payload=dumps(report).encode())
    served.channel.part()


def _job_files(boot: Boot, served: session.Session) -> outputs.Files | None:
    """Fetch the files of a job directory that is a copy; what will come back, if anything does."""
    job = boot.job
    if not (job.job_copy or job.outputs or job.follow):
        return None
    boot.step = "job files"
    from apppot.guest.payload import inputs, outputs

    if job.job_copy:
        inputs.unpack(os.fsdecode(boot.line.words["apppot.drive"]), job, served.beat)
    served.files = outputs.Files(job, served.beat)
    return served.files


def _forget_job_files(job: Job) -> None:
    """Leave none of them on a session's disk."""
    if job.job_copy:
        from apppot.guest.payload import inputs

        inputs.remove()


def _command(boot: Boot) -> list[bytes]:
    if boot.job.argv or not boot.job.run_scripts:
        return boot.job.argv
    found = sources.scripts(root.ROOT)
    return [found[0].encode()] if found else []


def _report_failure(boot: Boot, error: BaseException) -> None:
    """Say on the console, and to the launcher if there is one, which step failed and why."""
    log(f"step {boot.step!r} failed: {type(error).__name__}: {error}")
    if boot.session is None:
        if boot.standalone is not None:
            boot.standalone.failed(f"step {boot.step!r} failed: {error}")
        log("the job ended with status 125")
        return
    reason = {"step": boot.step, "reason": f"{error}" or type(error).__name__}
    boot.session.channel.send(frames.FAILED, payload=dumps(reason).encode("ascii")[:4000])
    boot.session.channel.part()


def _run(boot: Boot) -> None:
    _boot(boot)
    if boot.session is not None:
        _serve(boot, boot.session)
    elif boot.standalone is not None:
        if boot.job.network is not None and boot.standalone.lease is None:
            boot.step = "network"
            network.bring_up(boot.job.network)
        boot.step = "payload"
        boot.standalone.serve()
        root.release(boot.points)


def _fill_standard_streams() -> None:
    """Where the machine has no console, the kernel opens none: what is opened first is no log."""
    try:
        os.fstat(2)
    except OSError:
        while os.open(os.devnull, os.O_RDWR) < 2:
            pass


def main() -> None:
    """Boot, serve, and whatever happens: sync and power off."""
    _fill_standard_streams()
    boot = Boot()
    try:
        _run(boot)
    except ChannelLost as error:
        log(f"the launcher is gone: {error}")
    except BaseException as error:
        try:
            _report_failure(boot, error)
        except Exception as again:
            log(f"and could not be reported: {again}")
    finally:
        os.sync()
        syscalls.power_off()
