"""The guest's console, as the launcher keeps it."""

from __future__ import annotations

import os
import sys

_CONSOLE_BYTES = 256 << 10


class Console:
    """The guest's console: the last of it in memory, all of it in a file where one is asked for."""

    def __init__(self, fd: int, log: int | None) -> None:
        self.fd: int | None = fd
        self._log = log
        self._tail = bytearray()
        os.set_blocking(fd, False)

    def pump(self) -> None:
        """Take what has come."""
        while self.fd is not None:
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                os.close(self.fd)
                self.fd = None
                return
            self._tail += data
            del self._tail[:-_CONSOLE_BYTES]
            self._write_log(data)

    def _write_log(self, data: bytes) -> None:
        if self._log is None:
            return
        try:
            os.write(self._log, data)
        except OSError as error:  # a full disk must not end a job
            sys.stderr.write(f"apppot: warning: --log: {error.strerror}\n")
            self._log = None

    def text(self) -> str:
        """The last of what was printed."""
        return self._tail.decode(errors="replace")
