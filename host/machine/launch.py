"""Acting on a launch plan: the one place where the launcher starts and ends processes.

Everything that is started or made hangs on one ExitStack, in this order: run directory (and its
keeper), CPU, network helper, file servers, virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from apppot.guest.protocol import drive
from apppot.host.capabilities.capabilities import Capabilities, memory_place
from apppot.host.channel.relay import Console, GuestFailed, Outcome, Relay
from apppot.host.channel.streams import Sink, Source
from apppot.host.common import terminal
from apppot.host.common.errors import (
    EXIT_NOT_EXECUTABLE,
    EXIT_NOT_FOUND,
    EXIT_SIGNAL_BASE,
    EXIT_TIME_LIMIT,
    HypervisorError,
)
from apppot.host.common.paths import state_home
from apppot.host.confinement import bubblewrap
from apppot.host.confinement.bubblewrap import Confinement
from apppot.host.hypervisor.base import Hypervisor, Surroundings, Wires, shares
from apppot.host.hypervisor.launchplan import LaunchPlan, Shown
from apppot.host.images.store import hold
from apppot.host.machine import fileserver
from apppot.host.machine.diagnosis import diagnose, last_lines
from apppot.host.network import slirp as network
from apppot.host.plan.planner import place_paths
from apppot.host.process import cpus
from apppot.host.process.rundir import RunDir
from apppot.host.process.spawn import Child, spawn

if TYPE_CHECKING:
    from apppot.host.channel.joined import Joined
    from apppot.host.channel.outputs import Returned
    from apppot.host.hypervisor.monitor import Monitor
    from apppot.host.hypervisor.qmp import Orders
    from apppot.host.runs.recorder import Book
    from apppot.host.warm.machine import Warmth

_ENOENT = 2


class NoHello(HypervisorError):
    """The guest never came to life: no payload has started, another hypervisor may be tried."""

    def __init__(self, cause: str, hint: str, reason: str) -> None:
        super().__init__(cause, hint)
        self.reason = reason


@dataclass
class Run:
    """One run: its plan, what it left, and the times of its steps (monotonic seconds)."""

    plan: LaunchPlan
    hypervisor: Hypervisor
    marks: list[tuple[str, float]] = field(default_factory=list)
    argv: tuple[str, ...] = ()
    confinement: Confinement = Confinement.NONE
    console: Console | None = None
    monitor: Monitor | Orders | None = None
    outcome: Outcome | None = None

    def mark(self, what: str) -> None:
        self.marks.append((what, time.monotonic()))


def run(
    plan: LaunchPlan,
    hypervisor: Hypervisor,
    capabilities: Capabilities,
    read_stdin: bool,
    open_book: Callable[[], Book] | None = None,
    warmth: Warmth | None = None,
) -> Run:
    """Run the plan to its end; what `open_book` makes lets others find and join it.

    `warmth` is for a machine that is to be kept, or that resumes.

    Raises HypervisorError when the guest failed, Aborted when a signal came before the payload.
    """
    record = Run(plan, hypervisor)
    for warning in plan.warnings:
        sys.stderr.write(f"apppot: warning: {warning}\n")
    try:
        with contextlib.ExitStack() as stack:
            relay = _start(record, capabilities, read_stdin, stack, open_book, warmth)
            record.outcome = relay.outcome
            relay.run()
            _check_returned(relay)
    except GuestFailed as failure:
        raise _explain(record, failure) from failure
    record.mark("cleaned up")
    return record


def _start(
    record: Run,
    capabilities: Capabilities,
    read_stdin: bool,
    stack: contextlib.ExitStack,
    open_book: Callable[[], Book] | None,
    warmth: Warmth | None,
) -> Relay:
    plan, hypervisor = record.plan, record.hypervisor
    needs = hypervisor.surroundings(plan)
    _check_file_size(plan, needs)
    _hold_images(plan, stack)
    tty = _terminal(plan, stack)
    rundir = _run_directory(plan, needs, capabilities, tty)
    stack.callback(rundir.remove)
    exchange = rundir.directory("exchange") if hypervisor.exchange else None
    net = rundir.directory("net")
    held = cpus.hold() if plan.cpus == 1 and hypervisor.pinned else None
    if held is not None:
        stack.callback(held.release)
    private = [Shown("net", net), Shown("run", rundir.path + "/own")]
    if exchange is not None:
        private.append(Shown("exchange", exchange))
    rundir.directory("own")
    disks = _disk_files(plan, rundir, stack)
    sandbox = _sandbox(record, needs, capabilities, rundir, private, disks)
    place_paths(plan.job, sandbox.view)
    _write_drive(plan, rundir)
    record.mark("planned")
    console_read, console_write = os.pipe()
    helper = _network(record, capabilities, rundir, stack)
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    orders, monitor = _monitor(hypervisor, stack)
    wires = Wires(
        theirs.fileno(),
        None if helper.wire is None else helper.wire.fileno(),
        None if monitor is None else monitor.fileno(),
        None if warmth is None else warmth.memory,
        None if warmth is None else warmth.devices,
        _file_servers(record, capabilities, rundir, console_write, stack),
    )
    record.argv = (
        *sandbox.prefix,
        *hypervisor.argv(plan, sandbox.view, sandbox.temporary, wires),
    )
    vm = spawn(
        record.argv,
        output=console_write,
        keep=[*wires.descriptors(), *disks],
        cpus=() if held is None else (held.cpu,),
        env=_environment(sandbox),
        before_exec=sandbox.before_exec,
        announce=rundir.ends_with_us,
    )
    stack.callback(vm.end if hypervisor.guarded else vm.kill)
    record.mark("hypervisor")
    theirs.close()
    os.close(console_write)
    # While the guest boots: nothing waits for it.
    on_network_up = _once_connected(plan, helper, net)
    book = None if open_book is None else open_book()
    listener = None if book is None else stack.enter_context(book.open(rundir.path))
    record.console = Console(console_read, _log(plan, stack))
    if tty is not None:
        tty.raw()
    if orders is not None and monitor is not None:
        monitor.close()
        record.monitor = _connected(orders, stack) if warmth is None else warmth.attach(orders)
    relay = _relay(
        *(record, ours.fileno(), vm, exchange, tty, helper.output, read_stdin, book, listener),
        on_network_up,
        None if warmth is None else warmth.hello,
    )
    if warmth is not None:
        relay.send(warmth.first)
    return relay


def _monitor(
    hypervisor: Hypervisor, stack: contextlib.ExitStack
) -> tuple[socket.socket | None, socket.socket | None]:
    """Our end and the hypervisor's of its monitor, where it has one."""
    if not hypervisor.monitored:
        return None, None
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    return ours, theirs


def _connected(connection: socket.socket, stack: contextlib.ExitStack) -> Monitor | None:
    """The monitor, loaded and greeted while the guest boots; None where nobody answers."""
    try:
        from apppot.host.hypervisor import monitor
    except ImportError:
        return None  # without qemu.qmp nothing is lost but QEMU's own word on its end

    found = monitor.Monitor(connection)
    stack.callback(found.close)
    try:
        found.connect()
    except monitor.TROUBLE:
        return None  # the machine has ended, which its channel tells
    return found


def _hold_images(plan: LaunchPlan, stack: contextlib.ExitStack) -> None:
    """Keep the images where they are until the machine has ended, see `store.hold`."""
    for item in plan.shown:
        if item.name.startswith("image"):
            stack.callback(os.close, hold(item.source))


def _relay(
    record: Run,
    channel: int,
    vm: Child,
    exchange: str | None,
    tty: terminal.Terminal | None,
    helper: int | None,
    read_stdin: bool,
    book: Book | None,
    listener: socket.socket | None,
    on_network_up: Callable[[], object],
    on_hello: Callable[[], None] | None,
) -> Relay:
    assert record.console is not None
    plan = record.plan
    stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) if not read_stdin else 0
    return Relay(
        channel,
        vm,
        record.console,
        Source(stdin, exchange, plan.job.tty, window=record.hypervisor.window),
        (Sink(2, 1), Sink(3, 2)),
        tty=tty,
        hello_timeout=plan.hello_timeout,
        time_limit=plan.time_limit,
        helper=helper,
        helper_ready=helper is None or record.hypervisor.network_by_descriptor,
        vm_is_stopped=lambda: any_stopped(vm.pid),
        machine_says=lambda: "" if record.monitor is None else record.monitor.account(),
        on_network_up=on_network_up,
        on_started=bool if book is None else book.started,
        on_hello=on_hello,
        listener=listener,
        join=lambda relay: _joined(record, exchange, relay),
        take_files=None if plan.returned is None else partial(_returned, plan.returned),
    )


def _returned(directory: str, relay: Relay) -> Returned:
    from apppot.host.channel.outputs import Returned

    return Returned(directory, relay.send)


def _check_returned(relay: Relay) -> None:
    """Say what the guest could not return.  Raises OutputError where the job's files miss some."""
    if relay.returned is None:
        return
    for pattern in relay.returned.unmatched:
        sys.stderr.write(f"apppot: warning: nothing is there to bring back for {pattern}\n")
    if relay.returned.left_out:
        what = f"{relay.returned.left_out} sockets, FIFOs or devices"
        sys.stderr.write(f"apppot: warning: {what} are not brought back\n")
    if relay.returned.failures:
        from apppot.host.channel.outputs import OutputError

        status = exit_code(relay.outcome)
        failed = "\n    ".join(relay.returned.failures)
        raise OutputError(
            f"the command ended with status {status}, but not all that it left could be brought "
            f"back:\n    {failed}",
            "make room or mend what is named, and run it again",
        )


def _joined(record: Run, exchange: str | None, relay: Relay) -> Joined:
    from apppot.host.channel.joined import Joined

    return Joined(record.plan.job, exchange, record.hypervisor.window, relay.send, relay.stop)


def _once_connected(plan: LaunchPlan, helper: _Helper, net: str) -> Callable[[], object]:
    """What is to be done once the guest's interface is up, before its payload starts.

    slirp4netns is guarded, and opens the plan's ports: it takes orders only from then on.
    """
    if helper.slirp is None:
        return bool
    from apppot.host.network import guard

    child, connected = helper.slirp

    def step() -> None:
        try:
            guard.guard(child.pid, connected)
        except OSError as error:
            sys.stderr.write(
                "apppot: warning: root in the guest can reach this host's loopback: the network "
                f"helper cannot be guarded here ({error.strerror})\n"
            )
        for host_port, guest_port in plan.forwards:
            network.forward(net, host_port, guest_port)

    return step


def _check_file_size(plan: LaunchPlan, needs: Surroundings) -> None:
    """The guest's memory is a file, for which a soft limit can be lifted, a hard one not."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    need = max(needs.temporary, plan.scratch or 0)
    if hard != resource.RLIM_INFINITY and hard < need:
        raise HypervisorError(
            f"files may have {hard >> 10} KB here (ulimit -f), the guest needs {need >> 10} KB",
            "raise the hard limit on the size of files, or ask for less memory with --mem",
        )


def _terminal(plan: LaunchPlan, stack: contextlib.ExitStack) -> terminal.Terminal | None:
    if not plan.job.tty or not terminal.is_terminal(0):
        return None
    tty = terminal.Terminal(0)
    stack.callback(tty.restore)
    return tty


def _log(plan: LaunchPlan, stack: contextlib.ExitStack) -> int | None:
    if plan.log is None:
        return None
    try:
        fd = os.open(plan.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise HypervisorError(f"--log {plan.log}: {error.strerror}") from error
    stack.callback(os.close, fd)
    return fd


def _sandbox(
    record: Run,
    needs: Surroundings,
    capabilities: Capabilities,
    rundir: RunDir,
    private: Sequence[Shown],
    files: Sequence[int],
) -> bubblewrap.Sandbox:
    plan = record.plan
    shown = (*_shown_itself(plan), *private)
    record.confinement = bubblewrap.choose(plan.confine, capabilities)
    if record.confinement is Confinement.BUBBLEWRAP:
        assert capabilities.bwrap is not None
        return bubblewrap.bubblewrap(
            capabilities.bwrap,
            shown,
            memory=needs.temporary,
            as_root=os.getuid() == 0,
            system=needs.programs,
            libraries=needs.libraries,
            devices=needs.devices,
        )
    view = rundir.directory("view")
    for item in shown:
        folder, _, file = item.name.partition("/")
        # hostfs would show a link to a file as a link: it gets the file's directory, of which
        # the guest shows that file only.
        source = os.path.dirname(item.source) if file else item.source
        os.symlink(os.path.abspath(source), os.path.join(view, folder))
    own = rundir.directory("vm")
    if record.confinement is Confinement.LANDLOCK:
        disks = [Shown("", f"/proc/self/fd/{fd}", writable=True) for fd in files]
        return bubblewrap.landlocked(
            [*shown, *disks],
            view,
            own,
            system=needs.programs,
            libraries=needs.libraries,
            devices=needs.devices,
        )
    if plan.confine != "off":
        sys.stderr.write(f"apppot: warning: not confined: {capabilities.bwrap_reason}\n")
    return bubblewrap.unconfined(view, own)


def _disk_files(plan: LaunchPlan, rundir: RunDir, stack: contextlib.ExitStack) -> list[int]:
    """Disks of the guest that are files on a disk here, without a name: gone with the guest.

    The guest's kernel opens each through its descriptor, by the links own/scratch and own/drive.
    """
    place = os.environ.get("TMPDIR") or "/tmp"
    files = {"scratch": _scratch_disk(plan, place), "drive": _drive_disk(plan, place, rundir)}
    for name, fd in files.items():
        if fd is not None:
            stack.callback(os.close, fd)
            os.symlink(f"/proc/self/fd/{fd}", os.path.join(rundir.path, "own", name))
    return [fd for fd in files.values() if fd is not None]


def _scratch_disk(plan: LaunchPlan, place: str) -> int | None:
    """A sparse file for the writable layer."""
    if plan.scratch is None:
        return None
    room = os.statvfs(place)
    if room.f_bavail * room.f_frsize < plan.scratch:
        sys.stderr.write(f"apppot: warning: {place} has less room than --scratch asks for\n")
    try:
        fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.truncate(fd, plan.scratch)
    except OSError as error:
        raise HypervisorError(
            f"no scratch disk can be made in {place}: {error.strerror}",
            "set TMPDIR to a directory on a disk with room",
        ) from error
    return fd


def _drive_disk(plan: LaunchPlan, place: str, rundir: RunDir) -> int | None:
    """A file for the config drive, where it carries too much for memory."""
    if plan.copied is None:
        return None
    from apppot.host.machine import inputs

    try:
        if inputs.room(plan.copied, plan.inputs, rundir.path) <= inputs.IN_MEMORY:
            return None
        return inputs.open_disk(place)
    except OSError as error:
        raise _not_copied(place, error) from error


def _not_copied(place: str, error: OSError) -> HypervisorError:
    file = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return HypervisorError(
        f"the job directory's files cannot be copied to {place}: {file}{error.strerror}",
        "name those that the job needs (--input), or set TMPDIR to a directory on a disk with room",
    )


def _run_directory(
    plan: LaunchPlan,
    needs: Surroundings,
    capabilities: Capabilities,
    tty: terminal.Terminal | None,
) -> RunDir:
    """The run directory; without bubblewrap's own tmpfs, the guest's memory lies in it too."""
    kept = None if tty is None else (tty.fd, tty.settings())
    if bubblewrap.choose(plan.confine, capabilities) is Confinement.BUBBLEWRAP:
        return RunDir.create(terminal=kept)
    place, warning = memory_place(needs.temporary)
    if place is None:
        raise HypervisorError(
            f"no place for {plan.memory >> 20} MB of guest memory: /dev/shm and the temporary "
            "directories are full or mounted noexec",
            "install bubblewrap, or set TMPDIR to a directory that allows exec and has room",
        )
    if warning:
        sys.stderr.write(f"apppot: warning: {warning}\n")
    return RunDir.create(memory=place, terminal=kept)


def _environment(sandbox: bubblewrap.Sandbox) -> dict[str, str]:
    """The hypervisor's own environment: nothing of the caller's, which may hold secrets."""
    return {"PATH": "/usr/bin:/bin", "HOME": sandbox.temporary, "TMPDIR": sandbox.temporary}


def _write_drive(plan: LaunchPlan, rundir: RunDir) -> None:
    if plan.copied is None:
        rundir.file("own/drive", drive.pack(plan.job.dump()))
        return
    from apppot.host.machine import inputs

    path = os.path.join(rundir.path, "own", "drive")
    try:
        # Through the link, where it lies on a disk.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            inputs.write(file, plan.job.dump(), plan.copied, plan.inputs, rundir.path)
    except OSError as error:
        raise _not_copied(os.path.dirname(os.path.realpath(path)), error) from error


@dataclass(frozen=True)
class _Helper:
    """The network helper that was started, or none.

    `output` is the descriptor with what it prints, `wire` its end for a hypervisor that takes one;
    of one that does not, the output says when the helper is ready.  `slirp` is slirp4netns, and the
    descriptor that says when it has taken the guest's connection.
    """

    output: int | None = None
    wire: socket.socket | None = None
    slirp: tuple[Child, int] | None = None


def _network(
    record: Run, capabilities: Capabilities, rundir: RunDir, stack: contextlib.ExitStack
) -> _Helper:
    """Start the network helper."""
    plan = record.plan
    if not plan.network:
        return _Helper()
    place = os.path.join(rundir.path, "net")
    shown = Shown("net", place, writable=True)
    sandbox = _helper_sandbox(record, capabilities, shown, rundir.path, place, host_network=True)
    if capabilities.slirp is None:
        from apppot.host.network import usernet

        assert capabilities.qemu is not None
        child, output, wire = usernet.start(
            capabilities.qemu, sandbox, plan.forwards, rundir.ends_with_us
        )
        stack.callback(child.kill)
        stack.callback(wire.close)
        return _Helper(output, wire)
    child, output, connected = network.start(
        capabilities.slirp, sandbox, "net", rundir.ends_with_us
    )
    stack.callback(child.kill)
    stack.callback(os.close, connected)
    if not record.hypervisor.network_by_descriptor:
        return _Helper(output, slirp=(child, connected))
    wire = network.connect(output, place)
    stack.callback(wire.close)
    return _Helper(output, wire, (child, connected))


def _helper_sandbox(
    record: Run,
    capabilities: Capabilities,
    shown: Shown,
    view: str,
    temporary: str,
    *,
    host_network: bool,
) -> bubblewrap.Sandbox:
    """How a helper is held that uses one place of the host, as strictly as the plan's machine.

    Where it has no view of its own, `view` is for it to read and `temporary` to write.
    """
    # It can be held where the hypervisor's own processes cannot.
    wish = record.plan.confine if record.hypervisor.confinable else "auto"
    match bubblewrap.choose(wish, capabilities):
        case Confinement.BUBBLEWRAP:
            assert capabilities.bwrap is not None
            return bubblewrap.bubblewrap(
                capabilities.bwrap,
                (shown,),
                memory=1 << 20,
                as_root=os.getuid() == 0,
                host_network=host_network,
                system=True,
            )
        case Confinement.LANDLOCK:
            read = Shown("", "/proc/sys/fs/nr_open")  # by virtiofsd
            return bubblewrap.landlocked(
                (shown, read), view, temporary, system=True, network=host_network
            )
        case Confinement.NONE:
            return bubblewrap.unconfined(view, temporary)


def _served(plan: LaunchPlan) -> dict[str, bool]:
    """Directories that have a file server: tag, and whether the guest may write."""
    return dict(shares(plan)) if plan.job.share == fileserver.KIND else {}


def _shown_itself(plan: LaunchPlan) -> list[Shown]:
    """What the machine's own process sees: nothing of what others serve."""
    served = _served(plan)
    return [item for item in plan.shown if item.name.partition("/")[0] not in served]


def _file_servers(
    record: Run,
    capabilities: Capabilities,
    rundir: RunDir,
    output: int,
    stack: contextlib.ExitStack,
) -> tuple[tuple[str, int], ...]:
    """Start a server for each directory that has one; tags, and descriptors connected to them."""
    plan, program = record.plan, capabilities.virtiofsd
    served = _served(plan)
    if not served or program is None:
        return ()
    # Their sockets have names for as long as it takes to connect.
    place, wires = rundir.directory("files"), []
    for item in plan.shown:
        tag = item.name.partition("/")[0]
        if tag in served:
            sandbox = _helper_sandbox(record, capabilities, item, place, place, host_network=False)
            child, wire = fileserver.start(
                program, sandbox, item, place, output, rundir.ends_with_us
            )
            stack.callback(child.kill)
            stack.callback(wire.close)
            wires.append((tag, wire.fileno()))
    return tuple(wires)


def any_stopped(pid: int) -> bool:
    """Whether the process or one of its descendants is stopped (state T)."""
    pids = [pid]
    while pids:
        current = pids.pop()
        try:
            with open(f"/proc/{current}/stat", encoding="utf-8", errors="replace") as text:
                if text.read().rpartition(")")[2].split()[0] == "T":
                    return True
            with open(f"/proc/{current}/task/{current}/children", encoding="ascii") as text:
                pids += [int(word) for word in text.read().split()]
        except OSError:
            continue
    return False


# -- the end ---------------------------------------------------------------------------------


def exit_code(outcome: Outcome) -> int:
    """The launcher's exit status for what came back."""
    if outcome.timed_out:
        return EXIT_TIME_LIMIT
    report = outcome.report
    if report.get("status") is None:
        if report.get("errno") is None:
            raise HypervisorError("the guest reported no status", "this is a bug of AppPot")
        return EXIT_NOT_FOUND if report["errno"] == _ENOENT else EXIT_NOT_EXECUTABLE
    status = int(report["status"])
    if os.WIFSIGNALED(status):
        return EXIT_SIGNAL_BASE + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


def complaint(outcome: Outcome) -> str:
    """What to tell the user of a payload that could not be executed; empty otherwise."""
    report = outcome.report
    if outcome.timed_out:
        return "the time limit ended the payload"
    if report.get("errno") is not None:
        return f"{report['what']}: {os.strerror(int(report['errno']))}"
    return ""


def _explain(record: Run, failure: GuestFailed) -> HypervisorError:
    """The error for a guest that failed, with its console kept in a file."""
    console = record.console.text() if record.console is not None else ""
    meaning, remedy = diagnose(console)
    lines = [failure.reason + (f" ({meaning})" if meaning else "")]
    lines += [f"    | {line}" for line in last_lines(console)]
    kept = keep_failure(record, failure.reason, console)
    lines.append(f"  console and plan are kept in {kept}")
    if failure.silent:
        return NoHello("\n".join(lines), remedy, failure.reason)
    return HypervisorError("\n".join(lines), remedy)


_KEPT_FAILURES = 20


def keep_failure(record: Run, reason: str, console: str) -> str:
    """Write console and plan where the user finds them after the run; the directory."""
    last = OSError("no place")
    for home in (state_home(), f"/tmp/apppot-failures-{os.getuid()}"):
        place = os.path.join(home, "failures", f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}")
        try:
            os.makedirs(place, mode=0o700)
            _write(os.path.join(place, "console.log"), console)
            _write(os.path.join(place, "plan.json"), json.dumps(describe(record, reason), indent=1))
            _prune(os.path.dirname(place))
            return place
        except OSError as error:
            last = error
    return f"nowhere ({last.strerror})"


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def _prune(folder: str) -> None:
    for name in sorted(os.listdir(folder))[:-_KEPT_FAILURES]:
        for part in ("console.log", "plan.json"):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name, part))
        with contextlib.suppress(OSError):
            os.rmdir(os.path.join(folder, name))


def describe(record: Run, reason: str = "") -> dict[str, object]:
    """The run as JSON values, without the job's environment, which may hold secrets."""
    job = record.plan.job
    return {
        "version": 1,
        "reason": reason,
        "hypervisor": record.hypervisor.name,
        "kernel": record.plan.kernel.release,
        "memory": record.plan.memory,
        "cpus": record.plan.cpus,
        "confinement": record.confinement,
        "command": [os.fsdecode(word) for word in job.argv],
        "argv": list(record.argv),
        "shown": {item.name: item.source for item in record.plan.shown},
        "marks": record.marks,
    }
