"""Frozen dataclasses whose making costs a start little.

`dataclass(frozen=True)` compiles six methods for each class when its module is imported: 0.75 ms
a class, 25 ms for those that a run loads, half of the launcher's way to the hypervisor.  Here a
class gets its `__init__` only; the other methods are the same functions for all.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import TypeVar, dataclass_transform

_Object = TypeVar("_Object")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: type[_Object]) -> type[_Object]:
    """A class decorator; `replace`, `fields` and `asdict` take what it makes."""
    made = dataclass(eq=False, repr=False)(cls)
    for method in (__setattr__, __delattr__, __repr__, __eq__, __hash__):
        if method.__name__ not in cls.__dict__:
            setattr(made, method.__name__, method)
    return made


def __setattr__(self: object, name: str, value: object) -> None:
    """Set a field once: `__init__` does."""
    if name in self.__dict__ or name not in self.__dataclass_fields__:  # type: ignore[attr-defined]
        raise FrozenInstanceError(f"cannot assign to field {name!r}")
    self.__dict__[name] = value


def __delattr__(self: object, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


def __repr__(self: object) -> str:
    shown = (item for item in fields(self) if item.repr)  # type: ignore[arg-type]
    values = ", ".join(f"{item.name}={getattr(self, item.name)!r}" for item in shown)
    return f"{type(self).__qualname__}({values})"


def _compared(one: object) -> tuple[object, ...]:
    items = fields(one)  # type: ignore[arg-type]
    return tuple(getattr(one, item.name) for item in items if item.compare)


def __eq__(self: object, other: object) -> bool:
    if type(other) is not type(self):
        return NotImplemented
    return _compared(self) == _compared(other)


def __hash__(self: object) -> int:
    return hash(_compared(self))
