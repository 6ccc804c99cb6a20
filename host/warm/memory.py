"""A guest's memory as a file: what is not zero of it, in one piece, and where that belongs."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

from apppot.host.common.files import pwrite_all, write_all

_PAGE = 4096
_BLOCK = 1 << 20
# Zeros up to so many bytes are kept with what is around them: fewer, larger pieces.
_GAP = 16 << 10
_HUGE = 2 << 20
_COLLAPSE = 25  # madvise(2)'s MADV_COLLAPSE, which `mmap` does not know yet

Extents = list[tuple[int, int]]  # (offset, length) in bytes, rising


def pack(memory: int, file: int) -> Extents:
    """Append what is not zero in the file `memory` to `file`; where it came from."""
    extents: Extents = []
    for start, end in _pages(memory):
        if extents and start - extents[-1][0] - extents[-1][1] <= _GAP:
            extents[-1] = (extents[-1][0], end - extents[-1][0])
        else:
            extents.append((start, end - start))
    for offset, length in extents:
        for at in range(offset, offset + length, _BLOCK):
            write_all(file, os.pread(memory, min(_BLOCK, offset + length - at), at))
    return extents


def _pages(memory: int) -> Iterator[tuple[int, int]]:
    """(start, end) of runs of pages that are not all zero."""
    zeros = bytes(_PAGE)
    for start, end in _data(memory):
        for at in range(start, end, _BLOCK):
            block = os.pread(memory, min(_BLOCK, end - at), at)
            for page in range(0, len(block), _PAGE):
                if block[page : page + _PAGE] != zeros[: len(block) - page]:
                    yield at + page, at + min(page + _PAGE, len(block))


def _data(memory: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what the file has, between its holes."""
    size, at = os.fstat(memory).st_size, 0
    while at < size:
        try:
            at = os.lseek(memory, at, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        end = os.lseek(memory, at, os.SEEK_HOLE)
        yield at, end
        at = end


def unpack(file: int, extents: Extents, memory: int) -> None:
    """Put what `pack` took back where it belongs in `memory`, a file of zeros.

    Raises OSError, or ValueError where `file` is shorter than that.
    """
    _enlarge(extents, memory)
    with mmap.mmap(file, 0, prot=mmap.PROT_READ) as kept, memoryview(kept) as data:
        if len(data) != sum(length for _, length in extents):
            raise ValueError("the memory of the kept machine is not complete")
        at = 0
        for offset, length in extents:
            with data[at : at + length] as piece:
                pwrite_all(memory, piece, offset)
            at += length


def _enlarge(extents: Extents, memory: int) -> None:
    """Make huge pages of what `extents` touch of `memory`, a file of zeros, where Linux can (6.1).

    They are filled in half the time, and a guest on KVM meets each for the first time once, not 512
    times.
    """
    with mmap.mmap(memory, 0):
        at = _address(memory)
    # mmap(2) cannot be asked for an address here: one that ends where this did begins so.
    size = os.fstat(memory).st_size - -at % _HUGE
    with mmap.mmap(memory, size) as mapped, contextlib.suppress(OSError):
        for start, end in _blocks(extents, size):
            for block in range(start, end, _HUGE):
                mapped[block] = 0  # what has no page at all is left alone
            mapped.madvise(_COLLAPSE, start, end - start)


def _blocks(extents: Extents, size: int) -> list[tuple[int, int]]:
    """(start, end) of the runs of whole huge pages below `size` that `extents` touch."""
    runs: list[tuple[int, int]] = []
    for offset, length in extents:
        start = offset - offset % _HUGE
        end = min(offset + length + -(offset + length) % _HUGE, size - size % _HUGE)
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        elif start < end:
            runs.append((start, end))
    return runs


def _address(memory: int) -> int:
    """Where this process has mapped the file; 0 where it has not."""
    inode = str(os.fstat(memory).st_ino)
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            place, _, _, _, number, *_ = line.split()
            if number == inode and "/memfd:" in line:
                return int(place.partition("-")[0], 16)
    return 0
