"""Who may import whom: the table of rooms in docs/design.md, against all imports of the tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from apppot.host.commands.table import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
EVERYWHERE = "host/common"


def table() -> dict[str, set[str]]:
    """Room -> the rooms that it may import, itself and `host/common` among them."""
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `((?:host|guest)[\w/.]*)` \|.*\| ([^|]*) \|$", text, re.MULTILINE)
    return {room: {room, EVERYWHERE, *re.findall(r"`([\w/.]+)`", may)} for room, may in rows}


def room_of(path: str, rooms: dict[str, set[str]]) -> str:
    """The room in which a module lies: the innermost folder, or file, that the table names."""
    found = [room for room in rooms if path == room or path.startswith(f"{room}/")]
    assert found, f"{path} lies in no room"
    return max(found, key=len)


def module_path(name: str) -> str | None:
    """Path of the module or package with a full name, from the tree's root; None for neither."""
    path = name.removeprefix("apppot.").replace(".", "/")
    if (ROOT / f"{path}.py").is_file():
        return f"{path}.py"
    return f"{path}/__init__.py" if (ROOT / path / "__init__.py").is_file() else None


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and path of every module of the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                folder = path.relative_to(ROOT).parents[node.level - 1]
                base = ".".join(filter(None, ("apppot", *folder.parts, node.module)))
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("apppot."):
                target = module_path(name) or module_path(name.rpartition(".")[0])
                assert target is not None, f"{path}:{node.lineno}: {name} is nowhere"
                yield node.lineno, target


def arrows() -> Iterator[tuple[str, str, str]]:
    """Every import as (where it stands, its module, the module that is imported)."""
    for folder in ("host", "guest"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            path = str(file.relative_to(ROOT))
            for line, target in imports(file):
                yield f"{path}:{line}", path, target
    for module, _ in COMMANDS.values():
        yield "COMMANDS", "host/commands/table.py", f"host/commands/{module}.py"


def test_every_import_is_an_arrow_of_the_table() -> None:
    rooms = table()
    wrong = []
    for where, source, target in arrows():
        room, other = room_of(source, rooms), room_of(target, rooms)
        if other not in rooms[room]:
            wrong.append(f"{where}: {room} -> {other} ({target})")
    assert not wrong, "\n".join(wrong)


def test_rooms_are_no_circle() -> None:
    """A room's arrows lead to rooms further down, whatever is drawn in later."""
    left = {room: may - {room} for room, may in table().items()}
    while left:
        lowest = [room for room, may in left.items() if not may & left.keys()]
        assert lowest, f"a circle among {sorted(left)}"
        for room in lowest:
            del left[room]


def test_every_arrow_is_used() -> None:
    """The table grants nothing that nobody needs."""
    rooms = table()
    used = {(room_of(source, rooms), room_of(target, rooms)) for _, source, target in arrows()}
    granted = {(r, other) for r, may in rooms.items() for other in may - {r, EVERYWHERE}}
    assert not granted - used
