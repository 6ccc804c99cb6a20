"""A few orders to QEMU on the launcher's way to the payload (QMP).

`monitor` does the same with a library, which takes longer to load than a kept machine to resume.
"""

from __future__ import annotations

import json
import socket
from typing import Any

# From its exec until QEMU answers may take long where all is emulated.
_SECONDS = 60.0


class OrderError(Exception):
    """QEMU refused an order, or does not answer."""


class Orders:
    """One QEMU's monitor, in the order of what is asked.  Methods raise OrderError."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(_SECONDS)
        self._input = bytearray()
        self._events: list[dict[str, Any]] = []

    def connect(self) -> None:
        """Shake hands; what happens to the machine is noted from now on."""
        self._receive()
        self.order("qmp_capabilities")

    def order(self, command: str, fd: int | None = None, **arguments: object) -> Any:
        """Execute a command, to which `fd` is lent; its answer."""
        line = json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
        try:
            socket.send_fds(self._connection, [line], [] if fd is None else [fd])
        except OSError as error:
            raise OrderError(f"{command}: QEMU takes no orders: {error}") from error
        while True:
            message = self._receive()
            if "error" in message:
                raise OrderError(f"{command}: {message['error'].get('desc')}")
            if "return" in message:
                return message["return"]

    def await_event(self, name: str, wanted: tuple[str, ...]) -> str:
        """Wait for the event `name` with a status of `wanted`; that status."""
        while True:
            for event in self._events:
                status = event.get("data", {}).get("status")
                if event["event"] == name and status in wanted:
                    return str(status)
            self._receive()

    def account(self) -> str:
        """Why the machine has ended, as far as QEMU says; never raises."""
        self._connection.settimeout(1.0)
        try:
            status = self.order("query-status")["status"]
            return "" if status == "running" else f"QEMU has it in the state {status}"
        except OrderError:
            pass  # gone: its last events tell
        for event in self._events:
            if event["event"] == "SHUTDOWN":
                return f"QEMU says why: {event['data'].get('reason', 'unknown')}"
        return ""

    def close(self) -> None:
        """Let go of it; the machine goes on."""
        self._connection.close()

    def _receive(self) -> dict[str, Any]:
        """The next message; an event is noted as well."""
        while b"\n" not in self._input:
            try:
                data = self._connection.recv(1 << 16)
            except OSError as error:
                raise OrderError(f"QEMU does not answer: {error}") from error
            if not data:
                raise OrderError("QEMU is gone")
            self._input += data
        line, _, rest = self._input.partition(b"\n")
        self._input = rest
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message)
        return message
