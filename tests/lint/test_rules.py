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


def test_only_the_process_wrapper_uses_subprocess() -> None:
    for folder in ("host", "guest"):
        for path, tree in modules(folder):
            if path != Path("host/process/run.py"):
                assert "subprocess" not in imported(tree), path


def test_only_the_spawners_fork_or_spawn() -> None:
    allowed = {
        Path("host/process/spawn.py"),
        Path("host/process/rundir.py"),  # the keeper
        Path("host/hypervisor/xenguard.py"),  # a program of its own
        Path("guest/payload/process.py"),
        Path("guest/init/standalone.py"),
        Path("guest/tools.py"),
        Path("guest/merge/root.py"),  # the holder of a user namespace
    }
    starters = {"fork", "posix_spawn", "spawnv", "system", "popen", "forkpty"}
    for folder in ("host", "guest"):
        for path, tree in modules(folder):
            calls = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} & starters
            assert not calls or path in allowed, (path, calls)


def test_the_list_of_packages_is_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        "apppot." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in ("guest", "host")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found


def test_typing_roots_are_links_to_the_folders() -> None:
    for name in ("guest", "host"):
        link = ROOT / "tests" / "typeroot" / "apppot" / name
        assert link.resolve() == ROOT / name


def test_every_recipe_is_installed() -> None:
    """All but what prepares a host for this tree, or for its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["data-files"].values()
    installed = {path for group in patterns for pattern in group for path in ROOT.glob(pattern)}
    recipes = {path for path in (ROOT / "image-recipes").rglob("*") if path.is_file()}
    own = [ROOT / "image-recipes" / name for name in ("host", "lab")]
    assert recipes - installed == {path for path in recipes if path.parent in own}


def test_files_are_locked_in_one_place() -> None:
    allowed = {Path("host/common/locks.py"), Path("host/hypervisor/xenguard.py")}
    for path, tree in modules("host"):
        calls = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "flock" not in calls or path in allowed, path
