"""How fast this processor's time stamp counter runs.

QEMU's emulation hands the host's counter to its guests, whose kernel has no other clock to
calibrate it against.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_COUNTER = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3"
_SECONDS = 0.05
_ATTEMPTS = 20


def khz() -> int | None:
    """Its rate, within a few parts in 100,000; None where the host lets nobody read it."""
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(_READ_COUNTER)
    place = ctypes.c_char.from_buffer(page)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))
    before = _sample(read)
    time.sleep(_SECONDS)
    after = _sample(read)
    return round((after[1] - before[1]) / (after[0] - before[0]) * 1_000_000)


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """(nanoseconds, counter) of one moment: of several attempts the least disturbed one."""
    best = (1 << 62, 0, 0)
    for _ in range(_ATTEMPTS):
        begun = time.monotonic_ns()
        counter = read()
        ended = time.monotonic_ns()
        best = min(best, (ended - begun, (begun + ended) // 2, counter))
    return best[1], best[2]
