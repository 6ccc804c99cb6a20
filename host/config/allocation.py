"""The batch system's allocation, read from the environment that it gives to a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def _slurm_memory(env: Mapping[str, str]) -> int | None:
    if env.get("SLURM_MEM_PER_NODE", "").isdigit():
        return int(env["SLURM_MEM_PER_NODE"]) << 20
    if env.get("SLURM_MEM_PER_CPU", "").isdigit():
        return (int(env["SLURM_MEM_PER_CPU"]) << 20) * (_batch_cpus(env) or 1)
    return None


# The host's share of a batch allocation: launcher, UML itself, page structures.
_OVERHEAD_BYTES = 64 << 20
_OVERHEAD_FRACTION = 0.03


def _batch_memory(env: Mapping[str, str]) -> int | None:
    allocated = _slurm_memory(env)
    if allocated is None:
        return None
    usable = int(allocated * (1 - _OVERHEAD_FRACTION)) - _OVERHEAD_BYTES
    return usable if usable > 64 << 20 else None


def _batch_cpus(env: Mapping[str, str]) -> int | None:
    for name in ("SLURM_CPUS_PER_TASK", "NSLOTS", "PBS_NCPUS"):
        if env.get(name, "").isdigit():
            return min(16, max(1, int(env[name])))
    return None


BATCH: dict[str, Callable[[Mapping[str, str]], Any]] = {
    "memory": _batch_memory,
    "cpus": _batch_cpus,
}
