"""The linters, as tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    *(
        "tests/lint",
        "tests/unit",
        "tests/tools",
        "tests/vm",
        "tests/scenarios",
        "tests/lab",
        "tests/harness",
    ),
    *("tests/conftest.py", "benchmarks"),
)


def check(*argv: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_mypy_strict_on_the_package() -> None:
    check("mypy")


@pytest.mark.timeout(300)
def test_mypy_strict_on_tests_and_benchmarks() -> None:
    check("mypy", *TESTS)


def test_ruff_finds_nothing() -> None:
    check("ruff", "check", ".")


def test_ruff_would_format_nothing() -> None:
    check("ruff", "format", "--check", ".")
