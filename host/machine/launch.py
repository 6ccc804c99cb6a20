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
from apppot.host.hypervisor.base import Descriptors
from apppot.host.hypervisor.launchplan import LaunchPlan, placed
from apppot.host.images.workspace import hold
from apppot.host.machine.disks import check_file_size, disk_files, write_drive
from apppot.host.machine.failure import explained
from apppot.host.machine.helpers import (
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

    Raises HypervisorError when the guest failed, Aborted when a signal came before the payload.
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


def _start(
    record: Run,
    stack: contextlib.ExitStack,
    open_recorder: Callable[[], RecordKeeper] | None,
    start: WarmStart | None,
) -> Relay:
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
    record.mark("planned")
    console_read, console_write = os.pipe()
    helper = start_network(plan, rundir, stack)
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    orders, monitor = monitor_sockets(hypervisor, stack)
    inherited = Descriptors(
        theirs.fileno(),
        None if helper.wire is None else helper.wire.fileno(),
        None if monitor is None else monitor.fileno(),
        None if start is None else start.memory,
        None if start is None else start.devices,
        start_file_servers(plan, rundir, console_write, stack),
    )
    record.argv = machine_argv(plan, rundir.path, inherited)
    vm = spawn(
        record.argv,
        output=console_write,
        keep=[*inherited.all(), *disks],
        cpus=() if held is None else (held.cpu,),
        env=hypervisor_environment(sandbox),
        before_exec=sandbox.before_exec,
        announce=rundir.ends_with_us,
    )
    stack.callback(vm.end if hypervisor.guarded else vm.kill)
    record.mark("hypervisor")
    theirs.close()
    os.close(console_write)
    # While the guest boots: nothing waits for it.
    on_network_up = once_connected(plan, helper, net)
    recorder = None if open_recorder is None else open_recorder()
    listener = None if recorder is None else stack.enter_context(recorder.open(rundir.path))
    record.console = Console(console_read, _log(plan, stack))
    if tty is not None:
        tty.raw()
    if orders is not None and monitor is not None:
        monitor.close()
        record.monitor = connect_monitor(orders) if start is None else start.attach(orders)
    hooks = Hooks(
        network_up=on_network_up,
        started=bool if recorder is None else recorder.started,
        hello=None if start is None else start.hello,
        listener=listener,
        join=partial(_joined, record, exchange),
        take_files=None if plan.returned is None else partial(_returned, plan.returned),
    )
    machine = _machine(record, ours.fileno(), vm, record.console)
    limits = Limits(plan.hello_timeout, plan.time_limit)
    relay = Relay(machine, _ends(plan, exchange, tty), limits, helper.output, hooks)
    if start is not None:
        relay.send(start.first)
    return relay


def _hold_images(plan: LaunchPlan, stack: contextlib.ExitStack) -> None:
    """Keep the images where they are until the machine has ended, see `store.hold`."""
    for item in plan.shown:
        if item.name.startswith("image"):
            stack.callback(os.close, hold(item.source))


def _machine(record: Run, channel: int, vm: Child, console: Console) -> RunningMachine:
    return RunningMachine(
        channel,
        vm,
        console,
        is_stopped=lambda: any_stopped(vm.pid),
        says=lambda: "" if record.monitor is None else record.monitor.account(),
    )


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
