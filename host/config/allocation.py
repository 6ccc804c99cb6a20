"""The batch system's allocation, read from the environment that it gives to a job.  Pure."""

from __future__ import annotations

from collections.abc import Mapping

from apppot.host.common.frozen import frozen

MAX_CPUS = 16  # of one guest

# The host's share of an allocation: launcher, UML itself, page structures.
_OVERHEAD_BYTES = 64 << 20
_OVERHEAD_FRACTION = 0.03
_LEAST_MEMORY = 64 << 20

_CPU_VARIABLES = ("SLURM_CPUS_PER_TASK", "NSLOTS", "PBS_NCPUS")


@frozen
class Allocation:
    """What a guest may use of the job that it runs in; None: nothing is said."""

    memory: int | None = None  # bytes, without the host's share
    cpus: int | None = None


def of_environment(env: Mapping[str, str]) -> Allocation:
    """The allocation that Slurm, Grid Engine or PBS describes in `env`."""
    return Allocation(_memory(env), _cpus(env))


def _memory(env: Mapping[str, str]) -> int | None:
    allocated = _slurm_memory(env)
    if allocated is None:
        return None
    usable = int(allocated * (1 - _OVERHEAD_FRACTION)) - _OVERHEAD_BYTES
    return usable if usable > _LEAST_MEMORY else None


def _slurm_memory(env: Mapping[str, str]) -> int | None:
    if (per_node := _number(env, "SLURM_MEM_PER_NODE")) is not None:
        return per_node << 20
    if (per_cpu := _number(env, "SLURM_MEM_PER_CPU")) is not None:
        return (per_cpu << 20) * (_cpus(env) or 1)
    return None


def _cpus(env: Mapping[str, str]) -> int | None:
    found = [number for name in _CPU_VARIABLES if (number := _number(env, name)) is not None]
    return min(MAX_CPUS, max(1, found[0])) if found else None


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    return int(text) if text.isdigit() else None
