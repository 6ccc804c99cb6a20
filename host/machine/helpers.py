"""What is started beside the hypervisor: network helper, file servers, its monitor."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.confinement.sandbox import Shown
from apppot.host.hypervisor.base import Hypervisor
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.machine import fileserver
from apppot.host.machine.run import Run
from apppot.host.machine.sandbox import file_served, helper_sandbox
from apppot.host.network import slirp as network
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


def once_connected(plan: LaunchPlan, helper: _Helper, net: str) -> Callable[[], object]:
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


def start_network(
    record: Run, capabilities: Capabilities, rundir: RunDir, stack: contextlib.ExitStack
) -> _Helper:
    """Start the network helper."""
    plan = record.plan
    if not plan.network:
        return _Helper()
    place = os.path.join(rundir.path, "net")
    shown = Shown("net", place, writable=True)
    sandbox = helper_sandbox(record, capabilities, shown, rundir.path, place, host_network=True)
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


def start_file_servers(
    record: Run,
    capabilities: Capabilities,
    rundir: RunDir,
    output: int,
    stack: contextlib.ExitStack,
) -> tuple[tuple[str, int], ...]:
    """Start a server for each directory that has one; tags, and descriptors connected to them."""
    plan, program = record.plan, capabilities.virtiofsd
    served = file_served(plan)
    if not served or program is None:
        return ()
    # Their sockets have names for as long as it takes to connect.
    place, wires = rundir.directory("files"), []
    for item in plan.shown:
        tag = item.name.partition("/")[0]
        if tag in served:
            sandbox = helper_sandbox(record, capabilities, item, place, place, host_network=False)
            child, wire = fileserver.start(
                program, sandbox, item, place, output, rundir.ends_with_us
            )
            stack.callback(child.kill)
            stack.callback(wire.close)
            wires.append((tag, wire.fileno()))
    return tuple(wires)
