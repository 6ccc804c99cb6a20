"""Orders to QEMU: a QEMU that its guest has taken over may answer anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from apppot.host.hypervisor.qmp import Monitor, OrderError

Pair = tuple[Monitor, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A monitor, and the end of QEMU."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Monitor(ours), theirs


def test_the_answer_comes_behind_events(pair: Pair) -> None:
    monitor, qemu = pair
    qemu.sendall(b'{"event": "RESUME"}\n{"return": {"status": "paused"}}\n')
    assert monitor.order("query-status") == {"status": "paused"}


def test_the_last_words_of_one_that_is_gone_are_heard(pair: Pair) -> None:
    monitor, qemu = pair
    qemu.sendall(b'{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}\n')
    qemu.close()
    assert monitor.account() == "QEMU says why: guest-reset"


def test_the_reason_of_an_end_says_more_than_the_state(pair: Pair) -> None:
    monitor, qemu = pair
    qemu.sendall(b'{"event": "SHUTDOWN", "data": {"reason": "guest-panic"}}\n')
    qemu.sendall(b'{"return": {"status": "shutdown"}}\n')
    assert monitor.account() == "QEMU says why: guest-panic"


def test_a_machine_that_stands_still_is_told_and_one_that_runs_is_not(pair: Pair) -> None:
    monitor, qemu = pair
    qemu.sendall(b'{"return": {"status": "internal-error"}}\n{"return": {"status": "running"}}\n')
    assert monitor.account() == "QEMU has it in the state internal-error"
    assert monitor.account() == ""


def test_a_qemu_without_a_greeting_is_given_up(pair: Pair) -> None:
    monitor, _ = pair
    with pytest.raises(OrderError, match="does not answer"):
        monitor.connect(0.01)


def test_a_refusal_is_told(pair: Pair) -> None:
    monitor, qemu = pair
    qemu.sendall(b'{"error": {"desc": "no such thing"}}\n')
    with pytest.raises(OrderError, match="no such thing"):
        monitor.order("migrate")


BAD = (b"\xff\n", b"[]\n", b"5\n", b'{"event": 5, "data": []}\nx\n', b"x" * (2 << 20))


@pytest.mark.parametrize("data", BAD, ids=lambda data: repr(data[:10]))
def test_what_is_not_qmp_is_an_error_and_no_account(pair: Pair, data: bytes) -> None:
    monitor, qemu = pair
    qemu.setblocking(False)
    qemu.send(data)
    qemu.shutdown(socket.SHUT_WR)
    with pytest.raises(OrderError):
        monitor.order("query-status")
    assert monitor.account() == ""
