"""Acting on a launch plan: the one place where the launcher starts and ends processes.

Everything that is started or made hangs on one ExitStack, in this order: run directory (and its
keeper), CPU, network helper, file servers, virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from apppot.host.channel.console import Console
from apppot.host.channel.outcome import GuestFailed, exit_code
from apppot.host.channel.relay import Ends, Hooks, Limits, Relay, RunningMachine
from apppot.host.channel.streams import Sink, Source
from apppot.host.common import terminal
from apppot.host.common.errors import (
    HypervisorError,
)
from apppot.host.confinement.sandbox import Sandbox
from apppot.host.hypervisor.base import Descriptors
from apppot.host.hypervisor.launchplan import LaunchPlan, placed
from apppot.host.images.workspace import hold
from apppot.host.machine.disks import check_file_size, disk_files, write_drive
from apppot.host.machine.failure import explained
from apppot.host.machine.helpers import (
    Helper,
    connect_monitor,
    monitor_sockets,
    once_connected,
    start_file_servers,
    start_network,
)
from apppot.host.machine.run import RecordKeeper, Run, WarmStart
from apppot.host.machine.sandbox import (
    furnished,
    hypervisor_environment,
    machine_argv,
    run_directory,
)
from apppot.host.process import cpus
from apppot.host.process.rundir import RunDir
from apppot.host.process.spawn import Child, any_stopped, spawn

if TYPE_CHECKING:
    from apppot.host.channel.joined import Joined
    from apppot.host.channel.outputs import Returned


def run(
    plan: LaunchPlan,
    open_recorder: Callable[[], RecordKeeper] | None = None,
    start: WarmStart | None = None,
) -> Run:
    """Run the plan to its end; what `open_recorder` makes lets others find and join it.

    `start` is for a machine that is to be kept, or that resumes.

    Raises HypervisorError when the guest failed, Aborted when a signal came before GO.
    """
    record = Run(plan)
    for warning in plan.warnings:
        sys.stderr.write(f"apppot: warning: {warning}\n")
    try:
        with contextlib.ExitStack() as stack:
            relay = _start(record, stack, open_recorder, start)
            record.outcome = relay.outcome
            relay.run()
            _check_returned(relay)
    except GuestFailed as failure:
        raise explained(record, failure) from failure
    record.mark("cleaned up")
    return record


@dataclass
class _Places:
    """What is made for one run before anything is started."""

    rundir: RunDir
    tty: terminal.Terminal | None
    exchange: str | None  # the directory for much input, where the hypervisor has one
    net: str
    cpus: tuple[int, ...]  # of its own; empty: any
    disks: list[int]
    sandbox: Sandbox


@dataclass
class _Started:
    """What was started, and our ends of it."""

    vm: Child
    channel: int
    console: int
    helper: Helper
    orders: socket.socket | None  # the hypervisor's monitor


def _start(
    record: Run,
    stack: contextlib.ExitStack,
    open_recorder: Callable[[], RecordKeeper] | None,
    start: WarmStart | None,
) -> Relay:
    places = _places(record, stack)
    record.mark("planned")
    started = _machine(record, places, start, stack)
    record.mark("hypervisor")
    # While the guest boots: nothing waits for it.
    return _relay(record, places, started, open_recorder, start, stack)


def _places(record: Run, stack: contextlib.ExitStack) -> _Places:
    plan, hypervisor = record.plan, record.plan.hypervisor
    check_file_size(plan)
    _hold_images(plan, stack)
    tty = _terminal(plan, stack)
    rundir = run_directory(plan, tty)
    stack.callback(rundir.remove)
    exchange = rundir.directory("exchange") if hypervisor.exchange else None
    net = rundir.directory("net")
    held = cpus.hold() if plan.cpus == 1 and hypervisor.pinned else None
    if held is not None:
        stack.callback(held.release)
    rundir.directory("own")
    disks = disk_files(plan, rundir, stack)
    sandbox = furnished(plan, rundir, disks)
    record.job = placed(plan.job, sandbox.view)
    write_drive(plan, record.job, rundir)
    own = () if held is None else (held.cpu,)
    return _Places(rundir, tty, exchange, net, own, disks, sandbox)


def _machine(
    record: Run, places: _Places, start: WarmStart | None, stack: contextlib.ExitStack
) -> _Started:
    """Start the helpers and the hypervisor."""
    plan, rundir = record.plan, places.rundir
    console_read, console_write = os.pipe()
    helper = start_network(plan, rundir, stack)
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    orders, monitor = monitor_sockets(plan.hypervisor, stack)
    inherited = Descriptors(
        theirs.fileno(),
        None if helper.wire is None else helper.wire.fileno(),
        None if monitor is None else monitor.fileno(),
        None if start is None else start.memory,
        None if start is None else start.devices,
        start_file_servers(plan, rundir, console_write, stack),
    )
    record.argv = machine_argv(plan, places.sandbox, inherited)
    vm = spawn(
        record.argv,
        output=console_write,
        keep=[*inherited.all(), *places.disks],
        cpus=places.cpus,
        env=hypervisor_environment(places.sandbox),
        before_exec=places.sandbox.before_exec,
        announce=rundir.ends_with_us,
    )
    stack.callback(vm.end if plan.hypervisor.guarded else vm.kill)
    theirs.close()
    os.close(console_write)
    if monitor is not None:
        monitor.close()
    return _Started(vm, ours.fileno(), console_read, helper, orders)


def _relay(
    record: Run,
    places: _Places,
    started: _Started,
    open_recorder: Callable[[], RecordKeeper] | None,
    start: WarmStart | None,
    stack: contextlib.ExitStack,
) -> Relay:
    """Who carries what the guest says, and what others ask of it."""
    plan, vm = record.plan, started.vm
    on_network_up = once_connected(plan, started.helper, places.net)
    recorder = None if open_recorder is None else open_recorder()
    folder = places.rundir.path
    listener = None if recorder is None else stack.enter_context(recorder.open(folder))
    record.console = Console(started.console, _log(plan, stack))
    if places.tty is not None:
        places.tty.raw()
    if (orders := started.orders) is not None:
        record.monitor = connect_monitor(orders) if start is None else start.attach(orders)
    machine = RunningMachine(
        started.channel,
        vm,
        record.console,
        is_stopped=lambda: any_stopped(vm.pid),
        says=lambda: "" if record.monitor is None else record.monitor.account(),
    )
    hooks = Hooks(
        network_up=on_network_up,
        started=bool if recorder is None else recorder.started,
        hello=None if start is None else start.hello,
        listener=listener,
        join=partial(_joined, record, places.exchange),
        take_files=None if plan.returned is None else partial(_returned, plan.returned),
    )
    ends = _ends(plan, places.exchange, places.tty)
    limits = Limits(plan.hello_timeout, plan.time_limit)
    relay = Relay(machine, ends, limits, started.helper.output, hooks)
    if start is not None:
        relay.send(start.first)
    return relay


def _hold_images(plan: LaunchPlan, stack: contextlib.ExitStack) -> None:
    """Keep the images where they are until the machine has ended, see `store.hold`."""
    for item in plan.shown:
        if item.name.startswith("image"):
            stack.callback(os.close, hold(item.source))


def _ends(plan: LaunchPlan, exchange: str | None, tty: terminal.Terminal | None) -> Ends:
    stdin = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) if not plan.read_stdin else 0
    source = Source(stdin, exchange, plan.job.tty, window=plan.hypervisor.window)
    return Ends(source, (Sink(2, 1), Sink(3, 2)), tty)


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

    window = record.plan.hypervisor.window
    assert record.job is not None
    return Joined(record.job, exchange, window, relay.send, relay.stop)


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
