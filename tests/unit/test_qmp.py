"""Orders to QEMU: a QEMU that its guest has taken over may answer anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from apppot.host.hypervisor.qmp import OrderError, Orders

Pair = tuple[Orders, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Orders, and the end of QEMU."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Orders(ours), theirs


def test_the_answer_comes_behind_events(pair: Pair) -> None:
    orders, qemu = pair
    qemu.sendall(b'{"event": "RESUME"}\n{"return": {"status": "paused"}}\n')
    assert orders.order("query-status") == {"status": "paused"}


def test_the_last_words_of_one_that_is_gone_are_heard(pair: Pair) -> None:
    orders, qemu = pair
    qemu.sendall(b'{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}\n')
    qemu.close()
    assert orders.account() == "QEMU says why: guest-reset"


def test_a_refusal_is_told(pair: Pair) -> None:
    orders, qemu = pair
    qemu.sendall(b'{"error": {"desc": "no such thing"}}\n')
    with pytest.raises(OrderError, match="no such thing"):
        orders.order("migrate")


BAD = (b"\xff\n", b"[]\n", b"5\n", b'{"event": 5, "data": []}\nx\n', b"x" * (2 << 20))


@pytest.mark.parametrize("data", BAD, ids=lambda data: repr(data[:10]))
def test_what_is_not_qmp_is_an_error_and_no_account(pair: Pair, data: bytes) -> None:
    orders, qemu = pair
    qemu.setblocking(False)
    qemu.send(data)
    qemu.shutdown(socket.SHUT_WR)
    with pytest.raises(OrderError):
        orders.order("query-status")
    assert orders.account() == ""
