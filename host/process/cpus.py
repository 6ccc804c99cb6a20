"""Which CPU a one-CPU guest is pinned to.

The guest kernel and its user process hand over to each other at each system call; on one host
CPU that is 2.5 times cheaper than across two.  So that two guests do not share a CPU while
another idles, each holds its CPU by a name that all launchers of the host share: an abstract
socket, which is gone with its holder.

A guest with several CPUs is left to the host's scheduler.  Measured with two on a quiet host
(benchmarks, group placement): parallel work took 0.55 of one CPU's time unpinned, and 1.01 with
each virtual CPU's thread pinned, since its user processes are not threads; system calls cost 34 µs
against 4.7 µs pinned.  Who asks for CPUs wants the former.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable


class CpuHold:
    """A CPU that is held until `release` or the end of the process."""

    def __init__(self, cpu: int, holder: socket.socket) -> None:
        self.cpu = cpu
        self._holder = holder

    def release(self) -> None:
        self._holder.close()


def hold(allowed: Iterable[int] | None = None) -> CpuHold | None:
    """Hold a CPU of the allocation (`allowed`, default the launcher's affinity) that is free.

    None when all are held: an unpinned guest is slower, two on one CPU are slower still.
    """
    cpus = sorted(os.sched_getaffinity(0) if allowed is None else allowed)
    # Not all launchers of a host should begin with CPU 0, where interrupts are served as well.
    start = os.getpid() % len(cpus)
    for cpu in [*cpus[start:], *cpus[:start]]:
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            holder.bind(f"\0apppot-cpu-{cpu}")
        except OSError:
            holder.close()
            continue
        return CpuHold(cpu, holder)
    return None
