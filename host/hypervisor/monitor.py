"""QEMU's monitor (QMP): what became of a machine, and orders to it.

Off the launcher's way to the payload: connected while the guest boots, on a socket that QEMU
inherited.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any

from qemu.qmp import QMPClient, QMPError

_SECONDS = 5.0
# Errors of a monitor whose QEMU is gone or does not answer.
TROUBLE = (QMPError, OSError, EOFError, asyncio.TimeoutError)


class Monitor:
    """One QEMU's monitor.  Methods raise one of TROUBLE when QEMU is gone or does not answer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._loop = asyncio.new_event_loop()
        self._client = QMPClient("machine")

    def connect(self) -> None:
        """Shake hands; what happens to the machine is noted from now on."""
        self._connection.setblocking(False)
        self._call(self._client.connect(self._connection))

    def order(self, command: str, seconds: float = _SECONDS, **arguments: object) -> Any:
        """Execute a QMP command; its answer."""
        return self._call(self._client.execute(command, arguments or None), seconds)

    def account(self) -> str:
        """Why the machine stands still or has ended, as far as QEMU says; never raises."""
        found = ""
        try:
            status = self.order("query-status", 1.0)["status"]
            found = "" if status == "running" else f"QEMU has it in the state {status}"
        except TROUBLE:
            pass  # gone: its last events tell
        while not self._client.events.empty():
            event = self._call(self._client.events.get())
            if event["event"] == "SHUTDOWN":
                found = f"QEMU says why: {event['data'].get('reason', 'unknown')}"
        return found

    def close(self) -> None:
        """Let go of it; the machine goes on."""
        try:
            self._call(self._client.disconnect())
        except TROUBLE:
            pass  # it was gone before
        self._loop.close()
        self._connection.close()

    def _call(self, work: Coroutine[Any, Any, Any], seconds: float = _SECONDS) -> Any:
        return self._loop.run_until_complete(asyncio.wait_for(work, seconds))
