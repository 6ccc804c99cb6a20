"""The hypervisor's argv as a start would make it, without starting anything."""

from __future__ import annotations

from apppot.host.hypervisor.base import Descriptors
from apppot.host.hypervisor.launchplan import LaunchPlan
from apppot.host.machine.sandbox import machine_argv, machine_sandbox

RUN_DIRECTORY = "RUNDIR"  # stands for the run directory's path
_FIRST = 3


def command_line(plan: LaunchPlan, *, resumes: bool = False) -> list[str]:
    """The words of `machine_argv`, with RUN_DIRECTORY and with descriptors counted from 3."""
    sandbox = machine_sandbox(plan, RUN_DIRECTORY)
    return list(machine_argv(plan, sandbox, _descriptors(plan, resumes)))


def _descriptors(plan: LaunchPlan, resumes: bool) -> Descriptors:
    """What the plan's machine inherits, in the order in which `launch` has it."""
    numbers = iter(range(_FIRST, 1 << 16))
    helper = plan.network_helper
    return Descriptors(
        channel=next(numbers),
        network=next(numbers) if helper is not None and helper.by_descriptor else None,
        monitor=next(numbers) if plan.hypervisor.monitored else None,
        memory=next(numbers) if resumes else None,
        devices=next(numbers) if resumes else None,
        files=tuple((server.shown.tag, next(numbers)) for server in plan.file_servers),
    )
