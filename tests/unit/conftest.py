"""Unit tests start no process and talk to nobody: who does gets an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

# Audit events, see the table in Python's documentation.
_STARTS = frozenset(
    ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
)
_guarded = False


def _refuse(event: str, _: tuple[object, ...]) -> None:
    if _guarded and event in _STARTS:
        raise AssertionError(f"a unit test must not start processes ({event}): see tests/tools")


sys.addaudithook(_refuse)


@pytest.fixture(autouse=True)
def starts_no_process() -> Iterator[None]:
    """Refuse every start of a process while a unit test runs."""
    global _guarded
    _guarded = True
    yield
    _guarded = False
