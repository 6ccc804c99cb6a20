"""Changes to the pot's directory: complete artefacts under their digest, then the manifest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from apppot.host.common import locks
from apppot.host.common.errors import PotError
from apppot.host.common.files import file_digest, read_json, sync, write_json
from apppot.host.pot.layout import MANIFEST, holding

KEEP = 3


@contextmanager
def locked(folder: Path, name: str = "lock") -> Iterator[None]:
    """Hold the folder's lock: one builder at a time, released by the kernel if we are killed."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.held(str(folder / name), mode=0o666))
        except OSError as error:
            hint = "set APPPOT_POT or XDG_DATA_HOME to a folder that you may write"
            raise PotError(f"{folder} cannot be written: {error.strerror}", hint) from error
        yield


def manifest(home: Path) -> dict[str, object]:
    """The pot's manifest, empty where there is none of this version."""
    return read_json(str(home / MANIFEST)) or {}


def entry(home: Path, kind: str) -> dict[str, object] | None:
    """The manifest's entry of one kind (see `layout`), if its files exist."""
    found = manifest(home).get(kind)
    if not isinstance(found, dict) or not (home / str(found.get("path"))).is_file():
        return None
    others = found.get("files", {})
    assert isinstance(others, dict)
    folder = (home / str(found["path"])).parent
    return found if all((folder / name).is_file() for name in others) else None


def current(kind: str) -> tuple[Path, dict[str, object]] | None:
    """The pot that the launcher takes `kind` from, and its entry; None where it finds no whole one.

    A damaged manifest counts as none: a build mends it.
    """
    try:
        found = holding(kind)
    except PotError:
        return None
    if found is None:
        return None
    home = Path(found[0])
    whole = entry(home, kind)
    return None if whole is None else (home, whole)


def publish(
    home: Path, kind: str, files: Sequence[Path], facts: Mapping[str, object]
) -> dict[str, object]:
    """Put finished files into the pot and make them the current ones; returns their entry.

    The first is the artefact that the entry's "path" and "digest" speak of; "files" has the
    digests of the others, which lie beside it.  The files are moved and must be on the pot's
    file system.  A crash at any point leaves either the old pot or the new one.
    """
    main, *others = files
    digest = file_digest(main)
    folder = home / kind / digest
    new = {**facts, "digest": digest, "path": str((folder / main.name).relative_to(home))}
    if others:
        new["files"] = {file.name: file_digest(file) for file in others}
    with locked(home):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            sync(str(file))
            os.replace(file, folder / file.name)
        sync(str(folder))
        state = {key: value for key, value in manifest(home).items() if key != "version"}
        write_json(str(home / MANIFEST), {**state, kind: new})
        _prune(home / kind, keep=digest)
    return new


def _prune(folder: Path, keep: str) -> None:
    """Remove all but the newest few; a guest that runs on one keeps its open file."""
    others = [path for path in folder.iterdir() if path.name != keep and path.is_dir()]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for old in others[KEEP - 1 :]:
        with suppress(OSError):
            shutil.rmtree(old)


@contextmanager
def workplace(home: Path, name: str) -> Iterator[Path]:
    """An empty folder on the pot's file system, gone afterwards; sweeps what a crash left."""
    root = home / "work"
    with locked(root, f"{name}.lock"):
        folder = root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
