"""The recipes of kernel and runtime as data, and the digests of what goes into a build."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from apppot.host.common.errors import BuildError
from apppot.host.common.frozen import frozen
from apppot.host.common.paths import recipe_homes
from apppot.host.pot.ext4 import ImageSpec


def recipes(name: str) -> Path:
    """The folder of the recipe `name` in the first place that has it."""
    places = [Path(home) / name for home in recipe_homes()]
    return next((place for place in places if place.is_dir()), places[-1])


SOURCE_HINT = "build from a checkout of AppPot, or use `apppot pot import FILE.tar`"


# What a kernel of the pot is called by the user, and the folder of its recipe.
KERNELS = ("uml", "x86_64")


@frozen
class SourceRecipe:
    """Which source package the kernels are built from, and what is patched in it."""

    package: str
    fallback: str
    suite: str
    patches: tuple[Path, ...]


@frozen
class KernelRecipe:
    """How to build one kernel; `steps` is about how many lines the build prints.

    `files` are (name in the pot, path that the build leaves); the first is the kernel itself.
    """

    name: str
    arch: str
    targets: tuple[str, ...]
    files: tuple[tuple[str, str], ...]
    steps: int
    tools: tuple[str, ...]
    packages: str
    features: tuple[str, ...]
    config: str
    patches: tuple[Path, ...]
    digest: str


@frozen
class RuntimeRecipe:
    """What the runtime is made of; paths are relative to its root."""

    suites: tuple[str, ...]
    packages: tuple[str, ...]
    python: str
    loader: str
    libraries: str
    links: Mapping[str, str]
    folders: tuple[str, ...]
    files: Mapping[str, str]
    drop: tuple[str, ...]
    keep: tuple[str, ...]
    imports: tuple[str, ...]
    image: ImageSpec
    sudo: Path
    llistxattr: Path
    init: Path
    bundler: Path
    digest: str


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise BuildError(f"the recipe {path} is missing", SOURCE_HINT) from error
    except tomllib.TOMLDecodeError as error:
        raise BuildError(f"the recipe {path} is not valid TOML: {error}") from error


def load_source(folder: Path | None = None) -> SourceRecipe:
    """Read what all kernels are built from; raises BuildError where it is missing or wrong.

    The patches are those of every kernel: none touches what another kernel is made of, and one
    unpacked tree serves all.
    """
    folder = folder or recipes("kernel")
    data = _load(folder / "source.toml")
    try:
        return SourceRecipe(
            package=data["package"],
            fallback=data["fallback"],
            suite=data["suite"],
            patches=tuple(patch for name in KERNELS for patch in _patches(folder / name)),
        )
    except KeyError as error:
        raise BuildError(f"the recipe {folder}/source.toml lacks {error}") from error


def _patches(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted((folder / "patches").glob("*.patch")))


def load_kernel(name: str = "uml", folder: Path | None = None) -> KernelRecipe:
    """Read a kernel's recipe below `folder`; raises BuildError where it is missing or wrong."""
    base = folder or recipes("kernel")
    folder = base / name
    source, data = _load(base / "source.toml"), _load(folder / "recipe.toml")
    patches = _patches(folder)
    files = [folder / "config", *patches]
    try:
        # Without what only helps the builder: a better estimate is not another kernel.
        content = json.dumps([source, data["build"]["arch"], data["kernel"]], sort_keys=True)
        return KernelRecipe(
            name=name,
            arch=data["build"]["arch"],
            targets=tuple(data["build"]["targets"]),
            files=tuple(data["files"].items()),
            steps=int(data["build"]["steps"]),
            tools=tuple(data["build"]["tools"]),
            packages=data["build"]["packages"],
            features=tuple(data["kernel"]["features"]),
            config=(folder / "config").read_text(),
            patches=patches,
            digest=digest_of(content, digest_files(files)),
        )
    except KeyError as error:
        raise BuildError(f"the recipe {folder}/recipe.toml lacks {error}") from error


# What the tree is made from; the agent has a digest of its own.
_RUNTIME_FILES = ("recipe.toml", "sudo.c", "llistxattr.c")


def load_runtime(folder: Path | None = None) -> RuntimeRecipe:
    """Read the runtime's recipe; raises BuildError where it is missing or wrong."""
    folder = folder or recipes("runtime")
    data = _load(folder / "recipe.toml")
    try:
        tree, image = data["tree"], data["image"]
        devices = {path: (major, minor) for path, (major, minor) in tree["devices"].items()}
        return RuntimeRecipe(
            suites=tuple(data["source"]["suites"]),
            packages=tuple(data["source"]["packages"]),
            python=tree["python"],
            loader=tree["loader"],
            libraries=tree["libraries"],
            links=tree["links"],
            folders=tuple(tree["folders"]),
            files=tree["files"],
            drop=tuple(tree["drop"]),
            keep=tuple(tree["keep"]),
            imports=tuple(tree["imports"]),
            image=ImageSpec(image["uuid"], image["label"], image["time"], {}, devices),
            sudo=folder / "sudo.c",
            llistxattr=folder / "llistxattr.c",
            init=folder / "apppot-init",
            bundler=folder / "bundle.py",
            digest=digest_files([folder / name for name in _RUNTIME_FILES]),
        )
    except KeyError as error:
        raise BuildError(f"the recipe {folder}/recipe.toml lacks {error}") from error


def digest_files(files: Iterable[Path]) -> str:
    """One hex sha256 over names and contents, in the order given."""
    total = hashlib.sha256()
    for file in files:
        data = file.read_bytes()
        total.update(f"{file.name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def digest_of(*words: str) -> str:
    """One hex sha256 over words, none of which can run into the next."""
    return hashlib.sha256("".join(f"{len(word)}:{word}" for word in words).encode()).hexdigest()


def config_lines(text: str) -> dict[str, str]:
    """CONFIG_NAME -> value of a fragment or a .config; "is not set" is the value n."""
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(CONFIG_\w+)=(.*)", line.strip()):
            found[match[1]] = match[2]
        elif match := re.fullmatch(r"# (CONFIG_\w+) is not set", line.strip()):
            found[match[1]] = "n"
    return found


def lost_options(wanted: str, got: str) -> list[str]:
    """Options of the fragment that the finished .config does not have as they were asked for."""
    have = config_lines(got)
    return [
        f"{name}={value} (is {have.get(name, 'n')})"
        for name, value in config_lines(wanted).items()
        if have.get(name, "n") != value
    ]
