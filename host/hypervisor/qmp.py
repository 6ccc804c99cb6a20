"""QEMU's monitor (QMP): what became of a machine, and orders to it.

A client of our own: the library (qemu.qmp, on asyncio) takes longer to load than a kept machine to
resume, and the launcher gives a few orders, one after the other.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

# From its exec until QEMU answers may take long where all is emulated.
_SECONDS = 60.0
_ACCOUNT_SECONDS = 1.0
# A QEMU that its guest has taken over may say anything.
_LONGEST = 1 << 20


class OrderError(Exception):
    """QEMU refused an order, does not answer, or not as it should."""


class Monitor:
    """One QEMU's monitor, in the order of what is asked.  Methods raise OrderError."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._input = bytearray()
        self._statuses: list[tuple[str, str]] = []  # of events: name, status
        self._reason = ""  # of the machine's end

    def connect(self, seconds: float = _SECONDS) -> None:
        """Shake hands; what happens to the machine is noted from now on."""
        self._receive(time.monotonic() + seconds)
        self.order("qmp_capabilities", seconds=seconds)

    def order(
        self, command: str, fd: int | None = None, seconds: float = _SECONDS, **arguments: object
    ) -> Any:
        """Execute a command, to which `fd` is lent; its answer."""
        deadline = time.monotonic() + seconds
        line = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        try:
            socket.send_fds(self._connection, [line], [] if fd is None else [fd])
        except OSError as error:
            raise OrderError(f"{command}: QEMU takes no orders: {error}") from error
        while True:
            message = self._receive(deadline)
            if "error" in message:
                raise OrderError(f"{command}: {message['error']}")
            if "return" in message:
                return message["return"]

    def await_event(self, name: str, wanted: tuple[str, ...]) -> str:
        """Wait for the event `name` with a status of `wanted`; that status."""
        deadline = time.monotonic() + _SECONDS
        while True:
            for event, status in self._statuses:
                if event == name and status in wanted:
                    return status
            self._receive(deadline)

    def account(self) -> str:
        """Why the machine stands still or has ended, as far as QEMU says; never raises."""
        state = ""
        try:
            found = self.order("query-status", seconds=_ACCOUNT_SECONDS)
            status = found.get("status") if isinstance(found, dict) else None
            state = "" if status == "running" else f"QEMU has it in the state {status!s:.40}"
        except OrderError:
            self._hear_last_words()
        return f"QEMU says why: {self._reason}" if self._reason else state

    def _hear_last_words(self) -> None:
        """Note the events that a QEMU which is gone, or deaf, has left."""
        deadline = time.monotonic() + _ACCOUNT_SECONDS
        with contextlib.suppress(OrderError):
            while time.monotonic() < deadline:
                self._receive(deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; of an event, what it says is noted."""
        while b"\n" not in self._input:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self._connection.recv(1 << 16)
            except OSError as error:
                raise OrderError(f"QEMU does not answer: {error}") from error
            if not data:
                raise OrderError("QEMU is gone")
            self._input += data
            if len(self._input) > _LONGEST or time.monotonic() > deadline:
                raise OrderError("QEMU says too much")
        line, _, rest = self._input.partition(b"\n")
        self._input = rest
        try:
            message = json.loads(line)
        except ValueError as error:
            raise OrderError(f"QEMU does not speak QMP: {error}") from error
        if not isinstance(message, dict):
            raise OrderError("QEMU does not speak QMP")
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        data = message.get("data")
        if "event" not in message or not isinstance(data, dict):
            return
        if message["event"] == "SHUTDOWN":
            self._reason = f"{data.get('reason', 'unknown')!s:.40}"
        elif message["event"] == "MIGRATION":
            self._statuses.append(("MIGRATION", str(data.get("status"))))
