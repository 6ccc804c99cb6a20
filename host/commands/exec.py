"""`apppot exec`: one more command in a virtual machine that runs already.

The launcher of that machine gets our stdin, stdout and stderr and carries them; what is left
here is to pass on signals and the terminal's size, and to return the command's status.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apppot.host.common.terminal import Terminal
    from apppot.host.runs.records import RunRecord

_OWN = (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `exec`; what stands after NAME belongs to the command."""
    parser.usage = f"{parser.prog} [OPTION]… NAME [COMMAND [ARG]…]"
    add = parser.add_argument
    add("-n", dest="no_stdin", action="store_true", help="stdin is /dev/null")
    add("-t", dest="tty", action="store_const", const=True, help="give the command a terminal")
    add("-T", dest="tty", action="store_const", const=False, help="give it none")
    add("-i", "--interactive", action="store_true", help=argparse.SUPPRESS)
    add("-u", "--user", metavar="USER", help="who runs it (default: as the run's own command)")
    add(
        "-e", "--env", metavar="NAME[=VALUE]", action="append", default=[],
        help="set a variable, beside those of the run's own command",
    )  # fmt: skip
    add("-w", "--workdir", metavar="DIR", help="where the command starts")
    add("name", metavar="NAME", help="name or id of a run")
    add("argv", metavar="COMMAND", nargs=argparse.REMAINDER, help="default: a login shell")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the command in the guest; returns its status."""
    from apppot.host.common import terminal
    from apppot.host.runs import records

    record = records.find(args.name)
    request = _request(args)
    with records.connect(record) as connection:
        tty = terminal.Terminal(0) if request.tty and terminal.is_terminal(0) else None
        client = _Client(connection, record, tty)
        client.ask(request.dump())
        try:
            return client.serve()
        finally:
            if tty is not None:
                tty.restore()


def _request(args: argparse.Namespace) -> Any:
    from apppot.host.channel.control import Request
    from apppot.host.commands.options import command, environment
    from apppot.host.common import terminal
    from apppot.host.config.caller import Caller

    caller = Caller.of_this_process()
    rows, columns = terminal.size(0)
    env = environment((), args.env)
    tty = caller.wants_terminal(args.tty, stdin=not args.no_stdin, shell=False)
    if tty and b"TERM" in os.environb:
        env.setdefault(b"TERM", os.environb[b"TERM"])
    return Request(
        argv=command(args.argv),
        env=env,
        cwd=None if args.workdir is None else os.fsencode(args.workdir),
        user=args.user,
        tty=tty,
        read_stdin=not args.no_stdin and caller.can_read_stdin,
        rows=rows,
        columns=columns,
    )


class _Client:
    """Our end of the connection."""

    def __init__(self, connection: socket.socket, record: RunRecord, tty: Terminal | None) -> None:
        self._connection, self._record, self._tty = connection, record, tty
        self._pending: list[int] = []

    def ask(self, request: bytes) -> None:
        """Send what is to be started, and our descriptors."""
        file = os.memfd_create("request", os.MFD_CLOEXEC)
        with open(file, "wb", closefd=False) as writer:
            writer.write(request)
        socket.send_fds(self._connection, [b'{"exec": 1}'], [0, 1, 2, file])
        os.close(file)

    def serve(self) -> int:
        """Pass signals on until the command has ended; its status.  Raises RunError."""
        wake = self._catch_signals()
        while True:
            poll = select.poll()
            poll.register(wake, select.POLLIN)
            poll.register(self._connection, select.POLLIN)
            ready = dict(poll.poll())
            if wake in ready:
                os.read(wake, 4096)
            while self._pending:
                self._signal(self._pending.pop(0))
            if self._connection.fileno() in ready:
                status = self._hear()
                if status is not None:
                    return status

    def _hear(self) -> int | None:
        from apppot.host.channel.control import MESSAGE_BYTES
        from apppot.host.runs.records import RunError

        try:
            data = self._connection.recv(MESSAGE_BYTES)
        except ConnectionError:
            data = b""
        message = json.loads(data or b'{"error": "its launcher is gone"}')
        if "error" in message:
            raise RunError(f"run {self._record.name}: {message['error']}")
        if "exit" in message:
            if message["complaint"]:
                sys.stderr.write(f"apppot: {message['complaint']}\n")
            return int(message["exit"])
        if "started" in message and self._tty is not None:
            self._tty.raw()
            self._resize()
        if "stopped" in message:
            self._stop()
        return None

    def _catch_signals(self) -> int:
        from apppot.host.channel.signals import FORWARDED

        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        for number in (*FORWARDED, *_OWN):
            if signal.getsignal(number) is not signal.SIG_IGN or number in _OWN:
                signal.signal(number, lambda number, _: self._pending.append(number))
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        return read

    def _signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGTSTP and self._tty is None:
            self._say({"signal": int(signal.SIGSTOP)})
            self._stop()
        elif number == signal.SIGCONT:
            if self._tty is not None:
                self._tty.raw()
                self._resize()
            self._say({"signal": number})
        else:
            self._say({"signal": number})

    def _stop(self) -> None:
        """The command has stopped: so do we."""
        if self._tty is not None:
            self._tty.restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _resize(self) -> None:
        from apppot.host.common import terminal

        if self._tty is not None:
            self._say({"resize": terminal.size(self._tty.fd)})

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._connection.send(json.dumps(message).encode())
        except OSError:  # it has ended; what it said last is still to be read
            pass
