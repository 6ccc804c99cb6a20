"""Builds the tuned kernel from Debian's source package and puts it into the pot."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apppot.host.errors import BuildError
from apppot.host.paths import cache_home, pot_home
from apppot.host.pot import store
from apppot.host.pot.apt import Apt, Package
from apppot.host.pot.boot import check_boots, measure_lpj
from apppot.host.pot.layout import Kernel
from apppot.host.pot.probe import probe_kernel
from apppot.host.pot.recipes import KernelRecipe, digest_of, load_kernel, lost_options
from apppot.host.pot.state import read_json, write_json
from apppot.host.process import ToolError, run, run_lines
from apppot.host.progress import Progress

# Fixed, so that the same source gives the same kernel.
REPRODUCIBLE = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "apppot",
    "KBUILD_BUILD_HOST": "apppot",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
}
BUILD_STEP = re.compile(r"^\s+(CC|AS|AR|LD|GEN|HOSTCC)\s")


@dataclass(frozen=True)
class Source:
    """The unpacked, patched source of one kernel series."""

    package: Package
    tree: Path


def build_kernel(jobs: int | None = None, force: bool = False) -> dict[str, object]:
    """Bring the pot's kernel up to date; returns its manifest entry.  `jobs`: default all CPUs.

    Costs nothing where the recipe has not changed.  Raises BuildError or ToolError; the pot
    then keeps the kernel it had.
    """
    recipe = load_kernel()
    home = Path(pot_home())
    if (current := _current(home, recipe)) and not force:
        return current
    check_tools(recipe)
    cache = Path(cache_home()) / "kernel"
    # The tree is in the cache, which may be on a larger disk than the pot.
    with store.workplace(cache, "kernel") as work, store.workplace(home, "kernel") as place:
        # Whoever held the lock may have built it meanwhile.
        if (current := _current(home, recipe)) and not force:
            return current
        source = _source(recipe, cache, work)
        _configure(recipe, source.tree)
        _compile(recipe, source.tree, cache, jobs or len(os.sched_getaffinity(0)))
        binary = place / "linux"
        run(["strip", "-o", binary, source.tree / "linux"])
        kernel = self_test(recipe, binary)
        facts: dict[str, object] = {
            "recipe": recipe.digest,
            "inputs": digest_of(recipe.digest, source.package.version, source.package.sha256),
            "source": f"{source.package.name} {source.package.version}",
            "release": kernel.release,
            "features": sorted(kernel.features),
        }
        entry = store.publish(home, "kernel", binary, facts)
    measure_lpj(kernel_of(home, entry))
    return entry


def _current(home: Path, recipe: KernelRecipe) -> dict[str, object] | None:
    """The pot's kernel, if it was built from this recipe."""
    entry = store.entry(home, "kernel")
    return entry if entry and entry.get("recipe") == recipe.digest else None


def kernel_of(home: Path, entry: dict[str, object]) -> Kernel:
    """The Kernel that a manifest entry describes."""
    features = entry["features"]
    assert isinstance(features, list)
    path, release = str(home / str(entry["path"])), str(entry["release"])
    return Kernel(path, release, str(entry["digest"]), True, frozenset(features), None)


def check_tools(recipe: KernelRecipe) -> None:
    """Raise BuildError that names what is missing for the build, and how to install it."""
    missing = [tool for tool in recipe.tools if shutil.which(tool) is None]
    if missing:
        raise BuildError(
            f"the kernel cannot be built: {', '.join(missing)} not installed",
            f"apt-get install {recipe.packages}   (or `apppot pot import FILE.tar`)",
        )


def self_test(recipe: KernelRecipe, binary: Path) -> Kernel:
    """Boot the finished kernel and see that it knows what the recipe says of it."""
    facts = probe_kernel(str(binary))
    words = facts["features"]
    assert isinstance(words, list)
    missing = sorted(set(recipe.features) - set(words))
    if missing:
        raise BuildError(f"the kernel was built without {', '.join(missing)}")
    release, digest = str(facts["release"]), str(facts["digest"])
    kernel = Kernel(str(binary), release, digest, True, frozenset(words), None)
    check_boots(kernel)
    return kernel


def series_order(recipe: KernelRecipe, offered: Sequence[str]) -> list[str]:
    """Source packages to try: the pinned series, then the others, newest first."""

    def version(name: str) -> tuple[int, ...]:
        return tuple(int(part) for part in name.removeprefix(recipe.fallback).split("."))

    pattern = re.escape(recipe.fallback) + r"\d+(\.\d+)+"
    others = [name for name in offered if re.fullmatch(pattern, name) and name != recipe.package]
    pinned = [recipe.package] if recipe.package in offered else []
    return pinned + sorted(others, key=version, reverse=True)


def _source(recipe: KernelRecipe, cache: Path, work: Path) -> Source:
    """Download, unpack and patch the first series that all patches apply to."""
    with Progress("kernel: package lists"):
        apt = Apt(cache / "apt", [recipe.suite])
        apt.update()
        names = series_order(recipe, apt.names(recipe.fallback))
    if not names:
        raise BuildError(f"{recipe.suite} offers no {recipe.fallback}* package")
    for name in names:
        (package,) = apt.packages([name])
        with Progress(f"kernel: download and unpack {name} {package.version}"):
            tree = _unpack(apt.download(package), work / name)
        if apply_patches(recipe, tree):
            if name != recipe.package:
                print(f"apppot: {recipe.package} is not usable here; took {name} instead")
            return Source(package, tree)
        shutil.rmtree(work / name)
    raise BuildError(f"the patches apply to none of {', '.join(names)}")


def _unpack(package: Path, folder: Path) -> Path:
    folder.mkdir()
    run(["dpkg-deb", "-x", package, folder / "package"], hint="apt-get install dpkg")
    (archive,) = (folder / "package" / "usr" / "src").glob("linux-source-*.tar.xz")
    run(["tar", "-C", folder, "-xJf", archive], timeout=1800)
    shutil.rmtree(folder / "package")
    (tree,) = folder.iterdir()
    return tree


def apply_patches(recipe: KernelRecipe, tree: Path) -> bool:
    """Apply all patches in order; False where one does not fit this source."""
    for patch in recipe.patches:
        words = ["patch", "-p1", "--batch", "--forward", "--fuzz=2", "-i", str(patch)]
        done = run(words, cwd=tree, check=False)
        if done.returncode:
            print(f"apppot: {patch.name} does not apply to {tree.name}")
            return False
    return True


def _configure(recipe: KernelRecipe, tree: Path) -> None:
    """tinyconfig + the recipe's fragment; raises BuildError where an option did not survive."""
    env = {**os.environ, **REPRODUCIBLE}
    arch = f"ARCH={recipe.arch}"
    fragment = tree / "apppot.config"
    fragment.write_text(recipe.config)
    with Progress("kernel: configure"):
        run(["make", arch, "tinyconfig"], cwd=tree, env=env)
        merge = ["scripts/kconfig/merge_config.sh", "-m", ".config", str(fragment)]
        run(merge, cwd=tree, env={**env, "ARCH": recipe.arch})
        run(["make", arch, "olddefconfig"], cwd=tree, env=env)
    lost = lost_options(recipe.config, (tree / ".config").read_text())
    if lost:
        raise BuildError(f"the kernel's configuration lost {', '.join(lost)}")


def _compile(recipe: KernelRecipe, tree: Path, cache: Path, jobs: int) -> None:
    """make, with a bar: the lines of the build before, or the recipe's estimate, are the whole."""
    memory = cache / "steps.json"
    known = (read_json(str(memory)) or {}).get("steps")
    total = known if isinstance(known, int) else recipe.steps
    done = 0
    with Progress("kernel: compile", total) as progress:

        def on_line(line: str) -> None:
            nonlocal done
            if BUILD_STEP.match(line):
                done += 1
                progress.update(done, line.split()[-1])

        words = ["make", f"ARCH={recipe.arch}", f"-j{jobs}", "linux"]
        try:
            run_lines(words, on_line, cwd=tree, env={**os.environ, **REPRODUCIBLE})
        except ToolError as error:
            hint = f"apt-get install {recipe.packages}; 3 GB of free disk are needed"
            raise BuildError(f"the kernel did not compile: {error.cause}", hint) from error
    write_json(str(memory), {"steps": done})
