"""Trees that nobody thought of: changed in a session, saved, and the same again over the base."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.layers import QUIET, apart, tool
from tests.harness.vm import RELEASE, Launcher, Who, myself

from .generated_trees import KINDS

BASE = "debian-12-embedded"  # it has a Python
PROGRAM = Path(__file__).with_name("generated_trees.py")
TREES = 16  # of one boot, which costs more than they do

pytestmark = pytest.mark.timeout(300)


def operations(seed: int) -> list[list[tuple[str, int, int, str, int]]]:
    """For each tree what is done to it: a kind, what it is done to, a new name, how exactly."""
    chance = random.Random(seed)
    return [[_operation(chance) for _ in range(chance.randrange(5, 40))] for _ in range(TREES)]


def _operation(chance: random.Random) -> tuple[str, int, int, str, int]:
    number = chance.randrange
    return (
        chance.choice(KINDS),
        number(1 << 30),
        number(1 << 30),
        _name(chance).hex(),
        number(1 << 30),
    )


def _name(chance: random.Random) -> bytes:
    """Now and then one that is there already; else bytes (254 are the most)."""
    if chance.random() < 0.4:
        return chance.choice((b"a", b"b", b".wh.a", b"...", b"\n", b"-rf"))
    name = chance.randbytes(chance.choice((1, 2, 9, 254))).replace(b"\0", b"0").replace(b"/", b"%")
    return name if name not in (b".", b"..") else b"dots"


@pytest.fixture
def apppot(launcher_for: Callable[[Who], Launcher], place: Path) -> Launcher:
    return launcher_for(apart(myself(), place / "data"))


def listed(apppot: Launcher, options: tuple[str, ...], *words: str) -> list[bytes]:
    program = ("python3", "-IS", f"/home/user/job/{PROGRAM.name}", *words)
    running = apppot.start(*options, *QUIET, "-u", "root", BASE, *program)
    lines = running.finish(timeout=200).ok().splitlines()
    assert lines[0].decode().startswith(RELEASE)
    return sorted(lines[1:])


@pytest.mark.parametrize("seed", [1, 2])
def test_any_tree_is_the_same_again(apppot: Launcher, seed: int) -> None:
    (apppot.work / "operations").write_text(json.dumps(operations(seed)))
    (apppot.work / PROGRAM.name).write_bytes(PROGRAM.read_bytes())
    listed(apppot, ("--session", "s"), "apply", "/home/user/job/operations")
    # Once more: in the run that linked them, overlayfs may show two numbers for one file.
    state = listed(apppot, ("--session", "s"))
    assert tool(apppot, "changes", "save", "s", "-o", "it.changes").status == 0
    again = listed(apppot, ("--changes", "it.changes"))
    assert again == state, _difference(state, again)
    told = tool(apppot, "changes", "diff", "it.changes").ok().splitlines()
    assert len(told) > 5 * TREES, "hardly anything was done"
    assert all(line.decode("ascii").isprintable() for line in told)


def _difference(state: list[bytes], again: list[bytes]) -> str:
    gone, come = sorted(set(state) - set(again)), sorted(set(again) - set(state))
    return "\n".join(f"- {line!r}" for line in gone) + "\n".join(f"+ {line!r}" for line in come)
