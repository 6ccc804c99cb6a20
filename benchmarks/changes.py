"""Changes: what it costs to start with them, to unpack them as the original did, to save them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from apppot.host.images.changes import inguest
from apppot.host.process.run import run

from benchmarks import trees
from benchmarks.boot import ratios, timeline
from benchmarks.machines import APPPOT, IMAGE, Bench, apppot_run
from benchmarks.measure import TIMEOUT, Row, interleaved, launch, row

# Of the design: the largest changes against the smallest; saving against mksquashfs.
SAME, SAVE = 1.10, 1.5
MB = 1_000_000
SIZES = {"1 MB": MB, "100 MB": 100 * MB, "1 GB": 1000 * MB}
SEED = 20
TREE = "/opt/tree"
# What the guest's merge consists of.
STEPS = ("step agent: layers", "step agent: merge")


# -- starting with them -------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """One tree as a changes file and as the original's archive, both in `folder`."""

    changes: Path
    archive: Path


def merge(given: Bench) -> list[Row]:
    """Rows about starting with changes of several sizes, beside unpacking the same files."""
    folder = given.folder / "changes"
    folder.mkdir()
    sizes = SIZES if given.full else {name: SIZES[name] for name in ("1 MB", "100 MB")}
    made = {name: make(folder, size) for name, size in sizes.items()}
    subjects: dict[str, Callable[[], Mapping[str, float]]] = {"none": lambda: starting(given)}
    for name, files in made.items():
        subjects[name] = partial(starting, given, "--changes", str(files.changes))
    found = interleaved(subjects, given.rounds(7, 25))
    unpacked = {name: unpack(folder, m.archive, given.rounds(1, 3)) for name, m in made.items()}
    least = found["1 MB"]
    rows = []
    for part, title in (("merge", "layers and merge"), ("payload", "launch to payload")):
        for name, values in found.items():
            rows.append(row("changes", f"{title}, changes: {name}", values[part], "ms",
                            base=least[part], against="1 MB"))  # fmt: skip
    rows += [
        row("changes", f"{name} against 1 MB: {title}", ratios(found[name][part], least[part]), "×",
            budget=SAME)
        for name in sizes if name != "1 MB"
        for part, title in (("merge", "layers and merge"), ("payload", "launch to payload"))
    ]  # fmt: skip
    rows += [
        row("changes", f"tar -xzf of the same in the guest: {name}", values, "ms",
            base=found[name]["merge"], against="merge")
        for name, values in unpacked.items()
    ]  # fmt: skip
    return rows


def make(folder: Path, size: int) -> Made:
    """A tree of `size` bytes, saved as changes and packed as .tar.gz."""
    name = f"tree{size}"
    tree = folder / name
    trees.mixed(tree, size, SEED)
    archive, changes = folder / f"{name}.tar.gz", folder / f"{name}.changes"
    with session(folder, IMAGE, name) as made:
        launch([APPPOT, "changes", "save", made, "-o", changes])
    run(["tar", "-C", tree, "-I", "gzip -1", "-cf", archive, "."], timeout=TIMEOUT)
    run(["rm", "-r", tree])
    return Made(changes, archive)


@contextmanager
def session(folder: Path, image: str, name: str) -> Iterator[str]:
    """A session of `image` with the tree `name` of `folder` in TREE."""
    made = f"bench-{os.getpid()}-{name}"
    copy = f"mkdir -p {TREE} && cp -a {name}/. {TREE} && sync"
    options = ("--session", made, "--user", "root", "--network", "none")
    try:
        launch(apppot_run(image, "sh", "-c", copy, options=options), cwd=folder)
        yield made
    finally:
        run([APPPOT, "session", "rm", made], check=False)  # none where its first run failed


def starting(given: Bench, *options: str) -> Mapping[str, float]:
    """One `apppot run IMAGE true`: milliseconds of merging, and from launch to payload."""
    found = timeline(given.folder, *options)
    merging = sum(found[step] for step in STEPS)
    to_payload = found["launcher"] + found["hypervisor to payload"]
    return {"merge": 1000 * merging, "payload": 1000 * to_payload}


def unpack(folder: Path, archive: Path, rounds: int) -> list[float]:
    """Milliseconds of GNU tar in a guest onto a disk of its own, the original's way."""
    words = ["sh", "-c", f"mkdir {TREE} && tar -C {TREE} -xzf {archive.name}"]
    options = ("--user", "root", "--network", "none", "--scratch", "8G")
    return [1000 * payload(folder, IMAGE, words, options)["step"] for _ in range(rounds)]


# -- saving them --------------------------------------------------------------------------------


def save(given: Bench) -> list[Row]:
    """Rows about saving a session, beside mksquashfs on the same files in the same guest."""
    folder = given.folder / "save"
    folder.mkdir()
    size, number = (200, 10_000) if given.full else (50, 2_000)
    trees.mixed(folder / "mixed", size * MB, SEED)
    trees.packages(folder / "packages", number, SEED)
    return [
        *_saving(given, folder, "mixed", f"{size} MB mixed"),
        *_saving(given, folder, "packages", f"{number:,} small files"),
    ]


def _saving(given: Bench, folder: Path, name: str, files: str) -> list[Row]:
    # The image is the host, since it has mksquashfs.
    with session(folder, "host", name) as made:
        subjects: dict[str, Callable[[], Mapping[str, float]]] = {
            "apppot": lambda: saving(folder, made),
            "gzip": lambda: squashing(folder, made, "gzip"),
            "lz4": lambda: squashing(folder, made, "lz4"),
        }
        found = interleaved(subjects, given.rounds(1, 5))
    ours, default = found["apppot"], found["gzip"]
    against = ratios(ours["step"], default["step"])
    return [
        row("save", f"{files}: against mksquashfs, its default (gzip)", against, "×", budget=SAVE),
        row("save", f"{files}: changes save, whole command", ours["whole"], "s"),
        *(
            row("save", f"{files}: {title}", found[key]["step"], "s", base=default["step"],
                against="mksquashfs")
            for key, title in (("apppot", "changes save, in the guest"),
                               ("gzip", "mksquashfs, in the guest"),
                               ("lz4", "mksquashfs -comp lz4, in the guest"))
        ),
        *(
            row("save", f"{files}: size, {title}", found[key]["MB"], "MB")
            for key, title in (("apppot", "changes"), ("gzip", "mksquashfs"), ("lz4", "its lz4"))
        ),
    ]  # fmt: skip


def saving(folder: Path, made: str) -> Mapping[str, float]:
    """One `changes save`: seconds of the command, of its step in the guest, and the MB written."""
    output, report = folder / "saved", folder / "timeline.json"
    whole = launch([APPPOT, "changes", "save", made, "-o", output]).seconds
    layers = inguest.Layers("host", session=made)
    inguest.run(["save", output.name], layers, str(folder), timeline=str(report))
    found = {"whole": whole, "step": of_payload(report), "MB": output.stat().st_size / MB}
    output.unlink()
    return found


def squashing(folder: Path, made: str, compression: str) -> Mapping[str, float]:
    """One mksquashfs of the session's files: seconds in the guest, and the MB written."""
    output = folder / "squashed"
    words = ["mksquashfs", TREE, output.name, "-quiet", "-no-progress", "-comp", compression]
    options = ("--session", made, "--user", "root", "--network", "none")
    found = payload(folder, "host", words, options)
    size = output.stat().st_size / MB
    output.unlink()
    return {**found, "MB": size}


def payload(
    folder: Path, image: str, words: list[str], options: tuple[str, ...]
) -> Mapping[str, float]:
    """One run: seconds of the payload itself, as its timeline has it."""
    report = folder / "timeline.json"
    options = (*options, "--timeline", str(report))
    launch(apppot_run(image, *words, options=options), cwd=folder)
    return {"step": of_payload(report)}


def of_payload(report: Path) -> float:
    """Seconds from a payload's first instruction to its end."""
    lanes = json.loads(report.read_text())
    return next(float(end - begin) for lane, _, begin, end in lanes if lane == "payload")
