"""An image that is being put together from chunks, in a file that survives a kill -9.

Which chunks a partial file holds is never written down: `resume` reads the file and believes
digests only.  So no order of writes, and no power cut, can make it believe what is not there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from itertools import accumulate

from apppot.host.common.files import pwrite_all
from apppot.host.repository.model import Chunk, ChunkMap

FLUSH_SECONDS = 0.1


class Assembly:
    """The file at `path` on its way to the image of `chunk_map`; safe for several threads.

    While it is open, a thread digests what is complete from the start, so that the whole
    image's digest is known soon after the last chunk; another writes to disk early, so that the
    final fsync has little left to do.
    """

    def __init__(self, path: str, chunk_map: ChunkMap) -> None:
        self._map = chunk_map
        self._starts = [0, *accumulate(chunk.length for chunk in chunk_map.chunks)]
        self._numbers: dict[str, list[int]] = {}
        for number, chunk in enumerate(chunk_map.chunks):
            self._numbers.setdefault(chunk.digest, []).append(number)
        self._done = bytearray(len(chunk_map.chunks))
        self._changed = threading.Condition()
        self._closed = False
        self._writers = 0
        self._dirty = False
        self._failure: OSError | None = None
        self._digest = hashlib.sha256()
        self._threads: list[threading.Thread] = []
        self._empty = False
        self._file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def __enter__(self) -> Assembly:
        for work in (self._follow, self._flush):
            thread = threading.Thread(target=self._guard, args=(work,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            # The descriptor's number may soon be another file's.
            self._changed.wait_for(lambda: not self._writers)
        for thread in self._threads:
            thread.join()
        os.close(self._file)

    def resume(self) -> int:
        """Find what an earlier try left; returns the bytes that need not be had again."""
        there = os.fstat(self._file).st_blocks > 0
        self._empty = not there
        os.ftruncate(self._file, self._map.size)
        found = 0
        for number, chunk in enumerate(self._map.chunks if there else ()):
            data = os.pread(self._file, chunk.length, self._starts[number])
            if hashlib.sha256(data).hexdigest() == chunk.digest:
                found += chunk.length
                self._mark([number])
        return found

    def missing(self) -> list[Chunk]:
        """The chunks that are wanted still, each once, in the image's order."""
        return [
            self._map.chunks[numbers[0]]
            for numbers in self._numbers.values()
            if not all(self._done[number] for number in numbers)
        ]

    def put(self, digest: str, data: bytes) -> None:
        """Write a verified chunk wherever the image has it.  Raises OSError.

        Nothing is written once the assembly is closed, by however late a thread.
        """
        numbers = self._numbers[digest]
        hole = self._empty and data.count(0) == len(data)
        with self._changed:
            if self._closed:
                return
            self._writers += 1
        try:
            for number in () if hole else numbers:
                pwrite_all(self._file, data, self._starts[number])
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()
        self._mark(numbers)

    def _mark(self, numbers: list[int]) -> None:
        with self._changed:
            for number in numbers:
                self._done[number] = 1
            self._dirty = True
            self._changed.notify_all()

    def digest(self) -> str:
        """The whole image's SHA-256; call when nothing is missing.  Raises OSError."""
        self._threads[0].join()
        if self._failure is not None:
            raise self._failure
        return self._digest.hexdigest()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:  # the kernel tells of a failed write once, to whoever syncs
            self._failure = error

    def _follow(self) -> None:
        next_one = 0
        while next_one < len(self._done):
            with self._changed:
                while not self._done[next_one] and not self._closed:
                    self._changed.wait()
                if not self._done[next_one]:
                    return
                end = self._done.find(0, next_one, next_one + 64)
            end = min(next_one + 64, len(self._done)) if end < 0 else end
            start, stop = self._starts[next_one], self._starts[end]
            self._digest.update(os.pread(self._file, stop - start, start))
            next_one = end

    def _flush(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed, FLUSH_SECONDS)
                if self._closed:
                    return
                dirty, self._dirty = self._dirty, False
            if dirty:
                os.fdatasync(self._file)
