"""Builds the pot's kernels from Debian's source package and puts them into the pot."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from apppot.host.common.errors import BuildError
from apppot.host.common.files import read_json, write_json
from apppot.host.common.frozen import frozen
from apppot.host.common.paths import cache_home, pot_home
from apppot.host.common.progress import Progress
from apppot.host.pot import store
from apppot.host.pot.apt import Apt, Package
from apppot.host.pot.boot import check_boots, check_boots_in_qemu, measure_lpj
from apppot.host.pot.layout import KINDS, Kernel
from apppot.host.pot.probe import probe_kernel, probe_vmlinux
from apppot.host.pot.recipes import (
    KERNELS,
    KernelRecipe,
    SourceRecipe,
    digest_of,
    load_kernel,
    load_source,
    lost_options,
)
from apppot.host.process.run import ToolError, run, run_lines

# Fixed, so that the same source gives the same kernel.
REPRODUCIBLE = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "apppot",
    "KBUILD_BUILD_HOST": "apppot",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
}
BUILD_STEP = re.compile(r"^\s+(CC|AS|AR|LD|GEN|HOSTCC)\s")


@frozen
class KernelSource:
    """The unpacked, patched source of one kernel series."""

    package: Package
    tree: Path


def build_kernels(
    names: Sequence[str] = KERNELS, jobs: int | None = None, force: bool = False
) -> dict[str, dict[str, object]]:
    """Bring the pot's kernels up to date; returns name -> manifest entry.

    `jobs`: default all CPUs.  Costs nothing for a kernel whose recipe has not changed; the
    source is unpacked once.  Raises BuildError or ToolError; the pot then has the kernels that
    were finished, and of the others what it had.
    """
    home = Path(pot_home())
    recipes = [load_kernel(name) for name in names]
    if stale := stale_recipes(recipes, force):
        for recipe in stale:
            check_tools(recipe)
        cache = Path(cache_home()) / "kernel"
        # The tree is in the cache, which may be on a larger disk than the pot.
        with store.workplace(cache, "kernel") as work, store.workplace(home, "kernel") as place:
            # Whoever held the lock may have built them meanwhile.
            if stale := stale_recipes(recipes, force):
                source = _source(load_source(), cache, work)
                for recipe in stale:
                    _build(recipe, source, home, place, cache, jobs or _cpus())
    found = {name: store.current(KINDS[name]) for name in names}
    if uml := found.get("uml"):
        measure_lpj(kernel_of(*uml))
    return {name: current[1] for name, current in found.items() if current}


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def stale_recipes(recipes: Sequence[KernelRecipe], force: bool) -> list[KernelRecipe]:
    """The recipes from which the pot's kernels were not built."""
    return [recipe for recipe in recipes if force or not _is_current(recipe)]


def _is_current(recipe: KernelRecipe) -> bool:
    current = store.current(KINDS[recipe.name])
    return current is not None and current[1].get("recipe") == recipe.digest


def _build(
    recipe: KernelRecipe, source: KernelSource, home: Path, place: Path, cache: Path, jobs: int
) -> None:
    """Compile one kernel, try it and put it into the pot."""
    output = source.tree / f"build-{recipe.name}"
    _configure(recipe, source.tree, output)
    _compile(recipe, source.tree, output, cache, jobs)
    files = [place / name for name, _ in recipe.files]
    for file, (_, built) in zip(files, recipe.files, strict=True):
        shutil.copyfile(output / built, file)
    run(["strip", files[0]])
    files[0].chmod(0o755)
    # One build's output is 1 GiB; the next one needs the room.
    shutil.rmtree(output)
    facts: dict[str, object] = {
        "recipe": recipe.digest,
        "inputs": digest_of(recipe.digest, source.package.version, source.package.sha256),
        "source": f"{source.package.name} {source.package.version}",
        **self_test(recipe, files[0]),
    }
    store.publish(home, KINDS[recipe.name], files, facts)


def kernel_of(home: Path, entry: Mapping[str, object]) -> Kernel:
    """The User-Mode Linux kernel that a manifest entry describes."""
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


def self_test(recipe: KernelRecipe, binary: Path) -> dict[str, object]:
    """Boot the finished kernel; returns its release and features.

    Raises BuildError where it does not boot or lacks what the recipe says of it.
    """
    probe, boot = TESTS[recipe.name]
    facts = probe(str(binary))
    words = facts["features"]
    assert isinstance(words, list)
    missing = sorted(set(recipe.features) - set(words))
    if missing:
        raise BuildError(f"the kernel was built without {', '.join(missing)}")
    boot(binary, facts)
    return {"release": facts["release"], "features": sorted(words)}


def _boot_uml(binary: Path, facts: Mapping[str, object]) -> None:
    check_boots(kernel_of(Path("/"), {**facts, "path": str(binary)}))


def _boot_x86(binary: Path, facts: Mapping[str, object]) -> None:
    check_boots_in_qemu(str(binary))


Facts = dict[str, object]
# What a kernel says of itself, and whether it boots.
TESTS: Mapping[str, tuple[Callable[[str], Facts], Callable[[Path, Facts], None]]] = {
    "uml": (probe_kernel, _boot_uml),
    "x86_64": (probe_vmlinux, _boot_x86),
}


def series_order(recipe: SourceRecipe, offered: Sequence[str]) -> list[str]:
    """Source packages to try: the pinned series, then the others, newest first."""

    def version(name: str) -> tuple[int, ...]:
        return tuple(int(part) for part in name.removeprefix(recipe.fallback).split("."))

    pattern = re.escape(recipe.fallback) + r"\d+(\.\d+)+"
    others = [name for name in offered if re.fullmatch(pattern, name) and name != recipe.package]
    pinned = [recipe.package] if recipe.package in offered else []
    return pinned + sorted(others, key=version, reverse=True)


def _source(recipe: SourceRecipe, cache: Path, work: Path) -> KernelSource:
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
            return KernelSource(package, tree)
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


def apply_patches(recipe: SourceRecipe, tree: Path) -> bool:
    """Apply all patches in order; False where one does not fit this source."""
    for patch in recipe.patches:
        words = ["patch", "-p1", "--batch", "--forward", "--fuzz=2", "-i", str(patch)]
        done = run(words, cwd=tree, check=False)
        if done.returncode:
            print(f"apppot: {patch.name} does not apply to {tree.name}")
            return False
    return True


def _make(recipe: KernelRecipe, output: Path) -> list[str]:
    """The first words of each make: the tree stays clean for the other architectures."""
    return ["make", f"ARCH={recipe.arch}", f"O={output.name}"]


def _configure(recipe: KernelRecipe, tree: Path, output: Path) -> None:
    """tinyconfig + the recipe's fragment; raises BuildError where an option did not survive."""
    env = {**os.environ, **REPRODUCIBLE, "ARCH": recipe.arch}
    make = _make(recipe, output)
    output.mkdir()
    fragment = output / "apppot.config"
    fragment.write_text(recipe.config)
    with Progress(f"kernel {recipe.name}: configure"):
        run([*make, "tinyconfig"], cwd=tree, env=env)
        merge = tree / "scripts/kconfig/merge_config.sh"
        run([merge, "-m", ".config", fragment], cwd=output, env=env)
        run([*make, "olddefconfig"], cwd=tree, env=env)
    lost = lost_options(recipe.config, (output / ".config").read_text())
    if lost:
        raise BuildError(f"the kernel's configuration lost {', '.join(lost)}")


def _compile(recipe: KernelRecipe, tree: Path, output: Path, cache: Path, jobs: int) -> None:
    """make, with a bar: the lines of the build before, or the recipe's estimate, are the whole."""
    memory = str(cache / "steps.json")
    known = read_json(memory) or {}
    total = known.get(recipe.name)
    steps = total if isinstance(total, int) else recipe.steps
    done = 0
    with Progress(f"kernel {recipe.name}: compile", steps) as progress:

        def on_line(line: str) -> None:
            nonlocal done
            if BUILD_STEP.match(line):
                done += 1
                progress.update(done, line.split()[-1])

        words = [*_make(recipe, output), f"-j{jobs}", *recipe.targets]
        try:
            run_lines(words, on_line, cwd=tree, env={**os.environ, **REPRODUCIBLE})
        except ToolError as error:
            hint = f"apt-get install {recipe.packages}; 3 GiB of free disk are needed"
            raise BuildError(f"the kernel did not compile: {error.cause}", hint) from error
    write_json(memory, {**known, recipe.name: done})
