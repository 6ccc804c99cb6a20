"""How a confined process is started, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from apppot.host.common.frozen import frozen

VIEW = "/view"
TEMPORARY = "/tmp"
WISHES = ("auto", "required", "bubblewrap", "landlock", "off")


class Confinement(StrEnum):
    """How a hypervisor's process is held."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    NONE = "none"


@frozen
class Method:
    """A kind of confinement, with what it takes to hold a process so."""

    kind: Confinement
    bwrap: str = ""  # the program, for BUBBLEWRAP
    as_root: bool = False  # the caller is uid 0, whose capabilities are dropped


@frozen
class Sandbox:
    """How to start one confined process: the words in front of its own, and its two places."""

    prefix: tuple[str, ...]
    view: str
    temporary: str
    # What the child itself does before its exec; with any, it also dies with the launcher.
    before_exec: tuple[Callable[[], object], ...] = ()


def unconfined(view: str, temporary: str) -> Sandbox:
    """No confinement: the process sees what the user sees, and dies with the launcher."""
    return Sandbox((), view, temporary, (bool,))


@frozen
class Shown:
    """A host path that the virtual machine may use, under a short name in its view.

    The view is a directory of names without odd characters: hypervisors split paths at commas
    and colons.
    """

    name: str
    source: str
    writable: bool = False
    masked: tuple[str, ...] = ()  # directories below it that stay empty (relative paths)

    @property
    def tag(self) -> str:
        """Its directory in the view; of a single file, the one that holds it."""
        return self.name.partition("/")[0]
