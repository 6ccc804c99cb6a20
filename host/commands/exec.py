"""`apppot exec`: one more command in a virtual machine that runs already.

The launcher of that machine gets our stdin, stdout and stderr and carries them; what is left
here is to pass on signals and the terminal's size, and to return the command's status.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apppot.host.channel.control import ExecRequest, Order
    from apppot.host.channel.signals import CaughtSignals
    from apppot.host.common.terminal import Terminal
    from apppot.host.runs.records import RunRecord


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
    from apppot.host.channel.signals import CaughtSignals
    from apppot.host.common import terminal
    from apppot.host.runs import records

    record = records.find(args.name)
    request = _request(args)
    # Signals are caught until the terminal is as it was: nobody else restores it.
    with records.connect(record) as connection, CaughtSignals() as signals:
        tty = terminal.Terminal(0) if request.tty and terminal.is_terminal(0) else None
        client = _Client(connection, record, tty)
        client.ask(request)
        try:
            return client.serve(signals)
        finally:
            if tty is not None:
                tty.restore()


def _request(args: argparse.Namespace) -> ExecRequest:
    from apppot.host.channel.control import ExecRequest
    from apppot.host.commands.options import command, environment
    from apppot.host.common import terminal
    from apppot.host.config.caller import Caller

    caller = Caller.of_this_process()
    rows, columns = terminal.size(0)
    env = environment((), args.env)
    tty = caller.wants_terminal(args.tty, stdin=not args.no_stdin, shell=False)
    if tty and b"TERM" in os.environb:
        env.setdefault(b"TERM", os.environb[b"TERM"])
    return ExecRequest(
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
        from apppot.host.channel import control
        from apppot.host.channel.signals import JobControl

        self._connection, self._record = connection, record
        self._control = JobControl(
            tty,
            lambda number: self._say(control.Signal(number)),
            lambda rows, columns: self._say(control.Resize(rows, columns)),
        )

    def ask(self, request: ExecRequest) -> None:
        """Send what is to be started, and our descriptors."""
        from apppot.host.channel import control

        file = os.memfd_create("request", os.MFD_CLOEXEC)
        with open(file, "wb", closefd=False) as writer:
            writer.write(request.dump())
        socket.send_fds(self._connection, [control.dump(control.Execute())], [0, 1, 2, file])
        os.close(file)

    def serve(self, signals: CaughtSignals) -> int:
        """Pass signals on until the command has ended; its status.  Raises RunError."""
        while True:
            poll = select.poll()
            poll.register(signals.fd, select.POLLIN)
            poll.register(self._connection, select.POLLIN)
            ready = dict(poll.poll())
            for number in signals.take(ready):
                self._signal(number)
            if self._connection.fileno() in ready:
                status = self._hear()
                if status is not None:
                    signals.settle()
                    return status

    def _hear(self) -> int | None:
        from apppot.host.channel import control
        from apppot.host.runs.records import RunError

        try:
            data = self._connection.recv(control.MESSAGE_BYTES)
        except ConnectionError:
            data = b""
        gone = control.Refused("its launcher is gone")
        match control.load_answer(data) if data else gone:
            case control.Refused(reason):
                raise RunError(f"run {self._record.name}: {reason}")
            case control.Exited(status, complaint):
                if complaint:
                    sys.stderr.write(f"apppot: {complaint}\n")
                return status
            case control.Started():
                self._control.show()
            case control.Stopped():
                self._control.stopped()
        return None

    def _signal(self, number: int) -> None:
        from apppot.host.channel import control

        if not self._control.take(number):
            self._say(control.Signal(number))

    def _say(self, order: Order) -> None:
        from apppot.host.channel import control

        try:
            self._connection.send(control.dump(order))
        except OSError:  # it has ended; what it said last is still to be read
            pass
