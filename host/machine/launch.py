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

from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.channel.console import Console
from apppot.host.channel.outcome import GuestFailed, exit_code
from apppot.host.channel.relay import Relay
from apppot.host.channel.streams import Sink, Source
from apppot.host.common import terminal
from apppot.host.common.errors import (
    HypervisorError,
)
from apppot.host.confinement.sandbox import Shown
from apppot.host.hypervisor.base import Hypervisor, Wires
from apppot.host.hypervisor.launchplan import LaunchPlan, place_paths
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
from apppot.host.machine.run import Run
from apppot.host.machine.sandbox import hypervisor_environment, machine_sandbox, run_directory
from apppot.host.process import cpus
from apppot.host.process.spawn import Child, any_stopped, spawn

if TYPE_CHECKING:
    from apppot.host.channel.joined import Joined
    from apppot.host.channel.outputs import Returned
    from apppot.host.runs.recorder import Book
    from apppot.host.warm.machine import Warmth


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
        raise explained(record, failure) from failure
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
    check_file_size(plan, needs)
    _hold_images(plan, stack)
    tty = _terminal(plan, stack)
    rundir = run_directory(plan, needs, capabilities, tty)
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
    disks = disk_files(plan, rundir, stack)
    sandbox = machine_sandbox(record, needs, capabilities, rundir, private, disks)
    place_paths(plan.job, sandbox.view)
    write_drive(plan, rundir)
    record.mark("planned")
    console_read, console_write = os.pipe()
    helper = start_network(record, capabilities, rundir, stack)
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    orders, monitor = monitor_sockets(hypervisor, stack)
    wires = Wires(
        theirs.fileno(),
        None if helper.wire is None else helper.wire.fileno(),
        None if monitor is None else monitor.fileno(),
        None if warmth is None else warmth.memory,
        None if warmth is None else warmth.devices,
        start_file_servers(record, capabilities, rundir, console_write, stack),
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
    book = None if open_book is None else open_book()
    listener = None if book is None else stack.enter_context(book.open(rundir.path))
    record.console = Console(console_read, _log(plan, stack))
    if tty is not None:
        tty.raw()
    if orders is not None and monitor is not None:
        monitor.close()
        record.monitor = connect_monitor(orders) if warmth is None else warmth.attach(orders)
    relay = _relay(
        *(record, ours.fileno(), vm, exchange, tty, helper.output, read_stdin, book, listener),
        on_network_up,
        None if warmth is None else warmth.hello,
    )
    if warmth is not None:
        relay.send(warmth.first)
    return relay


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


# -- the end ---------------------------------------------------------------------------------
