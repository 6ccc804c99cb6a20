"""Frozen classes: as those of `dataclass(frozen=True)`."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, replace

import pytest
from apppot.host.common.frozen import frozen


@frozen
class Ours:
    """Fields of all kinds."""

    name: str
    size: int = 0
    more: tuple[str, ...] = ()
    told: list[int] = field(default_factory=list, compare=False)
    secret: str = field(default="s", repr=False)

    @property
    def twice(self) -> int:
        return 2 * self.size


@dataclass(frozen=True)
class Theirs:
    """The same."""

    name: str
    size: int = 0
    more: tuple[str, ...] = ()
    told: list[int] = field(default_factory=list, compare=False)
    secret: str = field(default="s", repr=False)


def test_it_is_shown_and_taken_apart_as_a_dataclass() -> None:
    ours, theirs = Ours("a", 1, ("x",)), Theirs("a", 1, ("x",))
    assert repr(ours) == repr(theirs).replace("Theirs", "Ours")
    assert asdict(ours) == asdict(theirs)
    assert [item.name for item in fields(ours)] == [item.name for item in fields(theirs)]
    assert Ours.__match_args__ == Theirs.__match_args__
    assert ours.twice == 2


def test_equal_by_what_is_compared() -> None:
    assert Ours("a", told=[1]) == Ours("a", told=[2])
    assert hash(Ours("a", told=[1])) == hash(Ours("a", told=[2]))
    assert Ours("a") != Ours("b")
    assert Ours.__eq__(Ours("a"), Theirs("a")) is NotImplemented
    assert len({Ours("a"), Ours("a"), Ours("a", 1)}) == 2


def test_copies() -> None:
    ours = Ours("a", 1)
    assert replace(ours, size=2) == Ours("a", 2)
    assert ours == Ours("a", 1)
    for made in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert made == ours and made is not ours


def test_nothing_is_set_twice_or_beside_the_fields() -> None:
    ours = Ours("a")
    for name in ("name", "size", "other"):
        with pytest.raises(FrozenInstanceError):
            setattr(ours, name, 1)
    with pytest.raises(FrozenInstanceError):
        del ours.name
    assert ours == Ours("a")


def test_a_method_of_the_class_stays() -> None:
    @frozen
    class Named:
        name: str

        def __repr__(self) -> str:
            return "own"

    assert repr(Named("a")) == "own"
