"""Locks of files: who holds one, and a file that goes while somebody waits for it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from apppot.host.common import locks


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "lock")


def test_one_holds_it_until_it_is_closed(place: str) -> None:
    held = locks.acquire(place)
    assert os.stat(place).st_mode & 0o777 == 0o600
    assert not os.get_inheritable(held)
    assert locks.try_acquire(place) is None
    assert locks.is_held(place)
    os.close(held)
    assert not locks.is_held(place)
    other = locks.try_acquire(place)
    assert other is not None
    os.close(other)


def test_many_share_it(place: str) -> None:
    with locks.held(place, shared=True), locks.held(place, shared=True):
        assert locks.try_acquire(place) is None
        assert not locks.is_held(place)


def test_what_is_not_there_is_held_by_nobody(place: str) -> None:
    with pytest.raises(FileNotFoundError):
        locks.is_held(place)
    assert not os.path.exists(place)


@pytest.mark.parametrize("again", [True, False])
def test_a_file_that_went_while_we_waited_is_no_lock(place: str, again: bool) -> None:
    first, got = locks.acquire(place), list[int]()
    waiting = threading.Thread(target=lambda: got.append(locks.acquire(place)))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    os.unlink(place)
    new = locks.acquire(place) if again else None
    os.close(first)
    if new is not None:
        waiting.join(0.1)
        assert waiting.is_alive(), "it took the lock of a file that is gone"
        os.close(new)
    waiting.join(10)
    assert locks.is_at(got[0], place)
    os.close(got[0])
