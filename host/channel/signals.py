"""Signals of the launcher: which are a process's in the guest, which are the launcher's own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Container, Iterator
from types import FrameType, TracebackType
from typing import Any, ClassVar

from apppot.host.common import terminal

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGALRM,
)
# What ends the launcher while the files of a payload that has ended come back.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_OWN = (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)


class CaughtSignals:
    """Signals as events of a loop: `fd` is readable when some have come, `take` gives them.

    While it is entered, they are caught, but for those that the caller ignores.
    """

    _settled: ClassVar[set[int]] = set()  # ignored by us, not by the caller

    def __init__(self) -> None:
        self.fd = self._write = -1  # while it is not entered
        self._pending: list[int] = []
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1

    def __enter__(self) -> CaughtSignals:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write, False)
        for number in (*FORWARDED, *_OWN):
            ignored = signal.getsignal(number) is signal.SIG_IGN and number not in self._settled
            if not ignored or number in _OWN:
                self._before[number] = signal.signal(number, self._catch)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._write)

    def _catch(self, number: int, _: FrameType | None) -> None:
        self._pending.append(number)  # Python itself has written to the wakeup descriptor

    def settle(self) -> None:
        """The process has ended and its status is known: no signal changes that any more.

        They would end the launcher on its last few milliseconds; a process that has ended does not
        feel one either.
        """
        for number in self._before.keys() & set(FORWARDED):
            self._before[number] = signal.SIG_IGN
            self._settled.add(number)

    def add(self, number: int) -> None:
        """As if the signal had come; while it is entered."""
        self._pending.append(number)
        os.write(self._write, b"\0")

    def take(self, ready: Container[int]) -> Iterator[int]:
        """Those that have come, in order; `ready` are the descriptors that a poll named."""
        if self.fd in ready:
            os.read(self.fd, 4096)
        while self._pending:
            yield self._pending.pop(0)


class JobControl:
    """Stops and continues a process in the guest together with the launcher, and its terminal.

    `signal_guest` and `resize_guest` tell it; `tty` is the terminal that the launcher shows it on.
    """

    def __init__(
        self,
        tty: terminal.Terminal | None,
        signal_guest: Callable[[int], object],
        resize_guest: Callable[[int, int], object],
    ) -> None:
        self._tty, self._signal, self._resize_guest = tty, signal_guest, resize_guest

    def take(self, number: int) -> bool:
        """Act on a signal of the launcher's own; False for one that is the process's."""
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGTSTP:
            self._stop()
        elif number == signal.SIGCONT:
            # The shell has the terminal as it likes it while we are stopped.
            self.show()
            self._signal(signal.SIGCONT)
        else:
            return False
        return True

    def show(self) -> None:
        """The terminal is the guest's from now on."""
        if self._tty is not None:
            self._tty.raw()
            self._resize()

    def stopped(self) -> None:
        """The process has stopped: the launcher follows, until `fg` continues both."""
        if self._tty is not None:
            self._tty.restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _stop(self) -> None:
        if self._tty is not None:
            # It may have other plans for this signal; when it stops, the guest says so.
            self._signal(signal.SIGTSTP)
            return
        # SIGTSTP would be ignored: it leads a session that nobody in the guest watches.
        self._signal(signal.SIGSTOP)
        self.stopped()

    def _resize(self) -> None:
        if self._tty is not None:
            self._resize_guest(*terminal.size(self._tty.fd))
