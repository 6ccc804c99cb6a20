"""Builds the runtime: packages -> pruned, compiled tree (cached) -> ext4 image in the pot."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import apppot.guest
from apppot.host.common.errors import BuildError
from apppot.host.common.files import read_json, write_json
from apppot.host.common.paths import cache_home, pot_home
from apppot.host.common.progress import Progress
from apppot.host.pot import store
from apppot.host.pot.apt import Apt, Package
from apppot.host.pot.ext4 import Tools, write_image
from apppot.host.pot.recipes import RuntimeRecipe, digest_of, load_runtime
from apppot.host.process.run import run

SUDO = "usr/share/apppot/supply/usr/bin/sudo"
SNAP = "usr/share/apppot/supply/usr/bin/apppot-snap"
LLISTXATTR = "usr/lib/llistxattr.so"
INIT = "usr/sbin/apppot-init"
LIBRARY = "usr/lib/apppot"
AGENT = f"{LIBRARY}/apppot/guest"
BUNDLER = f"{LIBRARY}/bundle.py"
# Part of the cache's key: raise it when the code below makes another tree of the same inputs.
TREE_FORMAT = "1"
IMAGE_FORMAT = "1"


def build_runtime(force: bool = False, refresh: bool = False) -> dict[str, object]:
    """Bring the pot's runtime up to date; returns its manifest entry.

    `force` builds everything anew, `refresh` asks the archive for newer packages.  Raises
    BuildError or ToolError; the pot then keeps the runtime it had.
    """
    recipe = load_runtime()
    home, cache = Path(pot_home()), Path(cache_home()) / "runtime"
    # Read once: what is built is what the key says, even while somebody edits it.
    agent = read_agent(recipe)
    with store.locked(cache):
        packages = _packages(recipe, refresh)
        base = _base_key(recipe, packages)
        inputs = _inputs(base, agent)
        current = store.current("runtime")
        if current and current[1].get("inputs") == inputs and not force:
            return current[1]
        tree = _base_tree(recipe, packages, cache / "trees" / base, force)
        with store.workplace(home, "runtime") as work:
            image = _image(recipe, tree, agent, work)
            facts: dict[str, object] = {"inputs": inputs, "size": image.stat().st_size}
            return store.publish(home, "runtime", [image], facts)


def up_to_date() -> bool | None:
    """Whether the pot's runtime is what this tree would build; None where that is unknown."""
    try:
        recipe = load_runtime()
    except BuildError:  # installed without recipes
        return None
    packages = _known_packages(recipe)
    current = store.current("runtime")
    if packages is None or current is None:
        return None
    return current[1].get("inputs") == _inputs(_base_key(recipe, packages), read_agent(recipe))


def _inputs(base: str, agent: Mapping[str, str]) -> str:
    return digest_of(IMAGE_FORMAT, base, *(f"{path}\0{text}" for path, text in agent.items()))


def read_agent(recipe: RuntimeRecipe) -> dict[str, str]:
    """The agent's files: path in the runtime -> text, in a fixed order."""
    root = Path(next(iter(apppot.guest.__path__)))
    sources = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    own = {INIT: recipe.init.read_text(), BUNDLER: recipe.bundler.read_text()}
    own[SNAP] = (root / "merge" / "apppot-snap").read_text()
    return own | {f"{AGENT}/{path}": (root / path).read_text() for path in sources}


def _packages(recipe: RuntimeRecipe, refresh: bool) -> list[Package]:
    """The exact packages: as found when this recipe was last built here, or the archive's."""
    known = None if refresh else _known_packages(recipe)
    if known is not None:
        return known
    path = _packages_file()
    with Progress("package lists"):
        apt = Apt(path.parent / "apt", recipe.suites)
        apt.update()
        packages = apt.packages(recipe.packages)
    rows = [[package.name, package.version, package.sha256] for package in packages]
    write_json(str(path), {"recipe": recipe.digest, "packages": rows})
    return packages


def _known_packages(recipe: RuntimeRecipe) -> list[Package] | None:
    """The packages of this recipe's last build here; None where there was none."""
    known = read_json(str(_packages_file()))
    if not known or known.get("recipe") != recipe.digest:
        return None
    rows = known["packages"]
    assert isinstance(rows, list)
    return [Package(*row) for row in rows]


def _packages_file() -> Path:
    return Path(cache_home()) / "runtime" / "packages.json"


def _base_key(recipe: RuntimeRecipe, packages: Sequence[Package]) -> str:
    return digest_of(TREE_FORMAT, recipe.digest, *sorted(package.sha256 for package in packages))


def _base_tree(
    recipe: RuntimeRecipe, packages: Sequence[Package], target: Path, force: bool
) -> Path:
    """All but the agent, from the cache where it is there."""
    if target.is_dir() and not force:
        return target
    work = target.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _unpack(recipe, packages, work)
    with Progress("runtime: prune and compile"):
        prune(recipe, work)
        _supply(recipe, work)
        _compile(recipe, work, work)
        run([*_linked(recipe, work, "usr/sbin/ldconfig"), "-X", "-r", str(work)], check=False)
        _try_imports(recipe, work)
    # Moved aside before it is deleted: half a tree under its final name would be taken for whole.
    doomed = target.parent / "doomed"
    shutil.rmtree(doomed, ignore_errors=True)
    doomed.mkdir()
    for old in target.parent.iterdir():
        if old not in (work, doomed):
            os.rename(old, doomed / old.name)
    os.rename(work, target)
    shutil.rmtree(doomed)
    return target


def _unpack(recipe: RuntimeRecipe, packages: Sequence[Package], work: Path) -> None:
    apt = Apt(Path(cache_home()) / "runtime" / "apt", recipe.suites)
    with Progress("runtime: download and unpack", len(packages)) as progress:
        for package in packages:
            progress.advance(package.name)
            hint = "apt-get install dpkg"
            run(["dpkg-deb", "-x", apt.download(package), work], hint=hint)
    for name, target in recipe.links.items():
        _link(work, name, target)


def _link(root: Path, name: str, target: str) -> None:
    """Make a link, for a folder of the old layout (/lib) after moving what is in it."""
    path = root / name
    if path.is_dir() and not path.is_symlink():
        _move_into(path, root / target)
        path.rmdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _move_into(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir() and not path.is_symlink():
            _move_into(path, target / path.name)
            path.rmdir()
        else:
            path.replace(target / path.name)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path of the tree is meant by one of the recipe's patterns."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def prune(recipe: RuntimeRecipe, root: Path) -> None:
    """Take out what the recipe drops, and folders that are empty then."""
    kept = (*recipe.keep, *recipe.links)
    for folder, folders, files in os.walk(root, topdown=False):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*files, *links]:
            path = os.path.relpath(os.path.join(folder, name), root)
            if matches(path, recipe.drop) and not matches(path, kept):
                os.unlink(os.path.join(folder, name))
        if folder != str(root) and not os.listdir(folder):
            os.rmdir(folder)
    for name in recipe.folders:
        (root / name).mkdir(parents=True, exist_ok=True)


def _supply(recipe: RuntimeRecipe, root: Path) -> None:
    """The recipe's own files, the CA bundle, and what is lent to images that lack it."""
    for name, text in recipe.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    authorities = sorted((root / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    if authorities:
        bundle = root / "etc/ssl/certs/ca-certificates.crt"
        bundle.parent.mkdir(parents=True, exist_ok=True)
        bundle.write_bytes(b"".join(path.read_bytes() for path in authorities))
        shutil.rmtree(root / "usr/share/ca-certificates")
    _gcc("-static", "-o", str(root / SUDO), str(recipe.sudo))
    _gcc("-shared", "-fPIC", "-o", str(root / LLISTXATTR), str(recipe.llistxattr))


def _gcc(*words: str) -> None:
    options = ("-Os", "-s", "-Wl,--build-id=none")
    run(["gcc", *options, *words], hint="apt-get install gcc libc6-dev")


def _linked(recipe: RuntimeRecipe, root: Path, program: str) -> tuple[str, ...]:
    """The words that run one of the tree's programs on this host, with the tree's libraries."""
    if program.endswith("ldconfig"):
        return (str(root / program),)  # static
    libraries = str(root / recipe.libraries)
    return (str(root / recipe.loader), "--library-path", libraries, str(root / program))


def _python_env() -> dict[str, str]:
    # A set's order is part of compiled code: the hash seed must not change between builds.
    return {
        "PATH": os.defpath,
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _compile(recipe: RuntimeRecipe, python_root: Path, tree: Path) -> None:
    """Compile every module with the runtime's own Python, for that no start does it again.

    unchecked-hash: the guest never compares a module with its source.
    """
    words = ["-S", "-s", "-P", "-m", "compileall", "-q", "-f", "-j", "1", "-s", str(tree)]
    words += ["-p", "/", "--invalidation-mode", "unchecked-hash", str(tree / "usr/lib")]
    python = _linked(recipe, python_root, recipe.python)
    done = run([*python, *words], env=_python_env(), check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise BuildError(f"the runtime's Python cannot compile a module:\n{said[-2000:]}")


def _try_imports(recipe: RuntimeRecipe, root: Path) -> None:
    text = "import sys; sys.path.append(sys.argv[1])\nfor name in sys.argv[2:]: __import__(name)\n"
    packages = str(root / "usr/lib/python3/dist-packages")
    words = ["-S", "-s", "-P", "-c", text, packages, *recipe.imports]
    run([*_linked(recipe, root, recipe.python), *words], env=_python_env())


def _image(recipe: RuntimeRecipe, tree: Path, agent: dict[str, str], work: Path) -> Path:
    """The image of the tree with the agent in it."""
    staged = work / "agent"
    for name, text in agent.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(text)
    for program in (INIT, SNAP):
        (staged / program).chmod(0o755)
    _compile(recipe, tree, staged)
    _bundle(recipe, tree, staged)
    target = work / "runtime.ext4"
    spec = replace(recipe.image, modes={SUDO: 0o4755, "tmp": 0o1777, "var/tmp": 0o1777})
    with Progress("runtime: image"):
        write_image([tree, staged], target, spec, _tools(recipe, tree))
    return target


def _bundle(recipe: RuntimeRecipe, python_root: Path, staged: Path) -> None:
    """Put the modules of the boot path into one file, see image-recipes/runtime/bundle.py."""
    library = staged / LIBRARY
    python = _linked(recipe, python_root, recipe.python)
    words = ["-S", "-s", "-P", "-B", str(staged / BUNDLER), str(library), f"/{LIBRARY}"]
    run([*python, *words, str(library / "boot.bundle")], env=_python_env())


def _tools(recipe: RuntimeRecipe, tree: Path) -> Tools:
    """The runtime's own e2fsprogs, so that the image does not depend on the host's."""
    for name in ("mke2fs", "debugfs", "e2fsck"):
        if not (tree / "usr/sbin" / name).is_file():
            raise BuildError(f"the runtime's packages have no {name}")
    return Tools(
        _linked(recipe, tree, "usr/sbin/mke2fs"),
        _linked(recipe, tree, "usr/sbin/debugfs"),
        _linked(recipe, tree, "usr/sbin/e2fsck"),
    )
