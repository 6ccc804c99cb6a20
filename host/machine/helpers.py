"""What is started beside the hypervisor: network helper, file servers, its monitor."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from apppot.host.channel.relay import HelperOutput
from apppot.host.common.frozen import frozen
from apppot.host.confinement.sandbox import Shown
from apppot.host.hypervisor.base import Hypervisor
from apppot.host.hypervisor.launchplan import LaunchPlan, NetworkKind
from apppot.host.machine import fileserver
from apppot.host.machine.sandbox import helper_sandbox
from apppot.host.network import slirp
from apppot.host.process.rundir import RunDir
from apppot.host.process.spawn import Child

if TYPE_CHECKING:
    from apppot.host.hypervisor.qmp import Monitor

# Nothing but QEMU's own word on its end is lost without its monitor: the run goes on.
_GREETING_SECONDS = 5.0


def monitor_sockets(
    hypervisor: Hypervisor, stack: contextlib.ExitStack
) -> tuple[socket.socket | None, socket.socket | None]:
    """Our end and the hypervisor's of its monitor, where it has one."""
    if not hypervisor.monitored:
        return None, None
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    return ours, theirs


def connect_monitor(connection: socket.socket) -> Monitor | None:
    """The monitor, loaded and greeted while the guest boots; None where nobody answers."""
    from apppot.host.hypervisor.qmp import Monitor, OrderError

    found = Monitor(connection)
    try:
        found.connect(_GREETING_SECONDS)
    except OrderError:
        return None  # the machine has ended, which its channel tells
    return found


def once_connected(plan: LaunchPlan, helper: Helper, net: str) -> Callable[[], object]:
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
            slirp.forward(net, host_port, guest_port)

    return step


@frozen
class Helper:
    """The network helper that was started, or none.

    `wire` is its end for a hypervisor that takes one.  `slirp` is slirp4netns, and the descriptor
    that says when it has taken the guest's connection.
    """

    output: HelperOutput = HelperOutput()
    wire: socket.socket | None = None
    slirp: tuple[Child, int] | None = None


def start_network(plan: LaunchPlan, rundir: RunDir, stack: contextlib.ExitStack) -> Helper:
    """Start the network helper."""
    helper = plan.network_helper
    if helper is None:
        return Helper()
    place = os.path.join(rundir.path, "net")
    shown = Shown("net", place, writable=True)
    sandbox = helper_sandbox(plan, shown, rundir.path, place, host_network=True)
    if helper.kind is NetworkKind.QEMU:
        from apppot.host.network import usernet

        child, output, wire = usernet.start(
            helper.program, sandbox, plan.forwards, rundir.ends_with_us
        )
        stack.callback(child.kill)
        stack.callback(wire.close)
        return Helper(HelperOutput(output), wire)
    child, output, connected = slirp.start(helper.program, sandbox, "net", rundir.ends_with_us)
    stack.callback(child.kill)
    stack.callback(os.close, connected)
    if not helper.by_descriptor:
        return Helper(HelperOutput(output, slirp.READY), slirp=(child, connected))
    wire = slirp.connect(output, place)
    stack.callback(wire.close)
    return Helper(HelperOutput(output), wire, (child, connected))


def start_file_servers(
    plan: LaunchPlan, rundir: RunDir, output: int, stack: contextlib.ExitStack
) -> tuple[tuple[str, int], ...]:
    """Start the plan's file servers; tags, and descriptors connected to them."""
    if not plan.file_servers:
        return ()
    # Their sockets have names for as long as it takes to connect.
    place, connected = rundir.directory("files"), []
    for server in plan.file_servers:
        sandbox = helper_sandbox(plan, server.shown, place, place, host_network=False)
        child, wire = fileserver.start(
            server.program, sandbox, server.shown, place, output, rundir.ends_with_us
        )
        stack.callback(child.kill)
        stack.callback(wire.close)
        connected.append((server.shown.tag, wire.fileno()))
    return tuple(connected)
