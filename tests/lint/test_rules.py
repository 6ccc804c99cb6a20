"""The house's rules that no linter knows: who imports whom, who may spawn, what is installed."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def modules(folder: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT), ast.parse(path.read_text())


def imported(tree: ast.AST) -> set[str]:
    """Full names of what a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_host_imports_of_the_guest_only_its_protocol() -> None:
    for path, tree in modules("host"):
        guest = {name for name in imported(tree) if name.startswith("apppot.guest.")}
        assert all(name.startswith("apppot.guest.protocol") for name in guest), path


def test_guest_never_imports_the_host() -> None:
    for path, tree in modules("guest"):
        assert not any(name.startswith("apppot.host") for name in imported(tree)), path


def test_merge_imports_nothing_of_payload() -> None:
    for path, tree in modules("guest/merge"):
        assert not any(name.startswith("apppot.guest.payload") for name in imported(tree)), path


# What starts a process: modules, and functions of `os` and `pty`.
STARTING_MODULES = {"subprocess", "multiprocessing", "pty", "_posixsubprocess"}
STARTERS = {
    *("fork", "forkpty", "system", "popen", "posix_spawn", "posix_spawnp"),
    *("create_subprocess_exec", "create_subprocess_shell"),
    *(f"{kind}{end}" for kind in ("exec", "spawn") for end in ("l", "le", "lp", "v", "ve", "vp")),
    *("execvpe", "execlpe", "spawnvpe", "spawnlpe"),
}


def starters(tree: ast.AST) -> set[str]:
    """What a module could start processes with."""
    named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    parts = {name.partition(".")[0] for name in imported(tree)}
    return (named & STARTERS) | (parts & STARTING_MODULES)


def test_processes_of_the_host_are_started_in_one_room() -> None:
    """And in `xenguard`, which is a program of its own."""
    for path, tree in modules("host"):
        if path.parts[:2] == ("host", "process") or path == Path("host/hypervisor/xenguard.py"):
            continue
        assert not starters(tree), (path, starters(tree))


def test_only_the_spawners_of_the_guest_start_processes() -> None:
    allowed = {
        Path("guest/payload/process.py"),
        Path("guest/init/standalone.py"),
        Path("guest/tools.py"),
        Path("guest/merge/root.py"),  # the holder of a user namespace
    }
    for path, tree in modules("guest"):
        assert path in allowed or not starters(tree), (path, starters(tree))


# Of `os` and `os.path`, what only computes.
PURE = {"path", "fsencode", "fsdecode", "join", "normpath", "basename", "dirname"}


def test_planning_opens_nothing() -> None:
    """`host/plan` knows the machine by what it is given; it reads no file, no environment."""
    for path, tree in modules("host/plan"):
        roots = {name.partition(".")[0] for name in imported(tree)}
        assert roots <= {
            "__future__",
            "apppot",
            "collections",
            "dataclasses",
            "enum",
            "os",
            "typing",
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "open", f"{path}:{node.lineno}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "os.path"):
                assert node.attr in PURE, f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_the_list_of_packages_is_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        "apppot." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("guest", "host")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    # Recipes are no code: a package of data only.
    assert listed == found | {"apppot.recipes"}


def test_typing_roots_are_links_to_the_folders() -> None:
    for name in ("guest", "host"):
        link = ROOT / "tests" / "typeroot" / "apppot" / name
        assert link.resolve() == ROOT / name


def test_every_recipe_is_installed() -> None:
    """All but what prepares a host for this tree, or for its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["apppot.recipes"]
    tree = ROOT / "image-recipes"
    recipes = {path for path in tree.rglob("*") if path.is_file()}
    installed = {path for pattern in patterns for path in tree.glob(f"{pattern}/*")} & recipes
    own = [tree / name for name in ("host", "lab")]
    assert recipes - installed == {path for path in recipes if path.parent in own}


def test_files_are_locked_in_one_place() -> None:
    allowed = {Path("host/common/locks.py"), Path("host/hypervisor/xenguard.py")}
    for path, tree in modules("host"):
        calls = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "flock" not in calls or path in allowed, path
