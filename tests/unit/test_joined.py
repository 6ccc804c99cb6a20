"""Processes that join a guest: what clients ask, without a guest."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from apppot.guest.protocol import frames
from apppot.guest.protocol.job import Job
from apppot.host.channel import control
from apppot.host.channel.joined import Joined


class Guest:
    """A launcher's side with nobody at the other end: `sent` is what the guest would get."""

    def __init__(self, folder: Path) -> None:
        self.exchange = folder / "exchange"
        self.exchange.mkdir()
        self.sent = b""
        self.stops: list[float] = []
        self.joined = Joined(
            Job(), str(self.exchange), frames.INPUT_CREDIT, self._send, self.stops.append
        )
        self._place = str(folder / "control")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self._place)
        self._listener.listen()
        self._first = self._fds()

    def _send(self, frame: bytes) -> None:
        self.sent += frame

    @staticmethod
    def _fds() -> set[int]:
        return {int(name) for name in os.listdir("/proc/self/fd")}

    def ask(self, order: control.Order, request: control.ExecRequest | None = None) -> bytes:
        """What a client hears that asks this and goes; nothing is heard of what is under way."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(self._place)
            self.joined.accept(self._listener)
            fds = []
            if request is not None:
                fds = [os.open(os.devnull, os.O_RDWR) for _ in range(3)]
                fds.append(os.memfd_create("request"))
                os.write(fds[3], request.dump())
            socket.send_fds(client, [control.dump(order)], fds)
            for fd in fds:
                os.close(fd)
            self._turn()
            client.setblocking(False)
            try:
                answer = client.recv(control.MESSAGE_BYTES)
            except BlockingIOError:
                answer = b""
        self._turn()
        return answer

    def _turn(self) -> None:
        self.joined.handle(dict.fromkeys(self._fds(), 0))

    def close(self) -> None:
        """All that was opened is closed again."""
        assert self._fds() <= self._first
        self._listener.close()

    def kinds(self) -> list[int]:
        """The types of the frames that the guest got since this was asked."""
        decoded = frames.Decoder(frames.HOST_TYPES).feed(self.sent)
        self.sent = b""
        return [kind for kind, _, _ in decoded]


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    made.close()


REQUEST = control.ExecRequest((b"true",), {}, read_stdin=False)


def test_a_client_that_goes_has_its_process_hung_up(guest: Guest) -> None:
    assert guest.ask(control.Execute(), REQUEST) == b""
    assert guest.kinds() == [frames.EXEC, *[frames.SIGNAL] * 2, *[frames.CLOSED] * 3]
    first = frames.STREAMS
    guest.joined.frame(frames.STARTED, first, b"{}")
    assert list(guest.exchange.iterdir()) == []
    # It has gone, so that it takes no input and hears of nothing.
    guest.joined.frame(frames.CHUNK_DONE, first + frames.STDIN, b"7")
    guest.joined.frame(frames.DATA, first + frames.STDOUT, b"x")
    guest.joined.frame(frames.EXIT, first, b'{"status": 0}')
    with pytest.raises(frames.FrameError, match="nobody started"):
        guest.joined.frame(frames.EXIT, first, b'{"status": 0}')


def test_a_process_that_cannot_be_described_takes_no_number(guest: Guest) -> None:
    """As where the exchange directory is full."""
    guest.exchange.rmdir()
    for _ in range(2 * frames.PROCESSES):
        assert b"bad request" in guest.ask(control.Execute(), REQUEST)
    assert guest.kinds() == []
    guest.exchange.mkdir()
    assert guest.ask(control.Execute(), REQUEST) == b""
    assert guest.kinds()[0] == frames.EXEC


def test_there_are_31_numbers(guest: Guest) -> None:
    for _ in range(frames.PROCESSES - 1):
        assert guest.ask(control.Execute(), REQUEST) == b""
    assert b"joined already" in guest.ask(control.Execute(), REQUEST)
    for number in range(1, frames.PROCESSES):
        guest.joined.frame(frames.EXIT, number * frames.STREAMS, b'{"status": 0}')
    assert guest.ask(control.Execute(), REQUEST) == b""


def test_orders_about_the_payload(guest: Guest) -> None:
    guest.ask(control.Stop(2.5))
    guest.ask(control.Signal(15))  # for a process that it does not have
    guest.ask(control.Resize(1, 2))
    assert guest.stops == [2.5]
    assert guest.kinds() == []


def test_a_request_without_its_descriptors(guest: Guest) -> None:
    assert b"0 descriptors" in guest.ask(control.Execute())
