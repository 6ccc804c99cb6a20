"""The pot as one file: deterministic to write, checked before anything of it is used."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

from apppot.host.errors import PotError
from apppot.host.paths import pot_home
from apppot.host.pot import store
from apppot.host.pot.boot import check_boots, measure_lpj
from apppot.host.pot.kernel import kernel_of
from apppot.host.pot.layout import MANIFEST
from apppot.host.progress import Progress

# kind -> name of its file.  The archive holds pot.json and one file of each kind, nothing else.
FILES = {"kernel": "linux", "runtime": "runtime.ext4"}
MAX_MANIFEST = 1 << 20
MAX_FILE = 4 << 30
CHUNK = 1 << 20


def export_pot(target: str) -> int:
    """Write kernel and runtime to a tar; returns its size in bytes.

    The same pot gives the same bytes.  Raises PotError where the pot lacks one of them.
    """
    home = Path(pot_home())
    parts = {kind: store.entry(home, kind) for kind in FILES}
    missing = [kind for kind, part in parts.items() if part is None]
    if missing:
        raise PotError(f"the pot has no {' and no '.join(missing)}", "run `apppot pot build`")
    text = json.dumps({"version": 1, **parts}, indent=1, sort_keys=True).encode() + b"\n"
    temporary = f"{target}.{os.getpid()}"
    try:
        with (
            Progress("pot: export"),
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            tar.addfile(_member(MANIFEST, len(text), 0o644), io.BytesIO(text))
            for kind, part in parts.items():
                assert part is not None
                _add(tar, kind, home / str(part["path"]))
        os.replace(temporary, target)
    except OSError as error:
        raise PotError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return os.path.getsize(target)


def _member(name: str, size: int, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = mode
    return member


def _add(tar: tarfile.TarFile, kind: str, path: Path) -> None:
    mode = 0o755 if kind == "kernel" else 0o644
    with open(path, "rb") as stream:
        tar.addfile(_member(f"{kind}/{FILES[kind]}", path.stat().st_size, mode), stream)


def import_pot(source: str) -> None:
    """Put a pot that `export_pot` wrote in the place of ours.

    Nothing changes unless every member is there, safe and of the digest that the manifest says,
    and the kernel boots here.  Raises PotError.
    """
    home = Path(pot_home())
    with store.workplace(home, "import") as work, Progress("pot: import"):
        try:
            with tarfile.open(source, "r:") as tar:
                parts = read_archive(tar, work)
        except (OSError, tarfile.TarError) as error:
            raise PotError(
                f"{source} is not a pot: {error}", "`apppot pot export` writes one"
            ) from error
        kernel = {**parts["kernel"], "path": str(work / "linux")}
        check_boots(kernel_of(Path("/"), kernel))
        entries = {
            kind: store.publish(home, kind, work / name, parts[kind])
            for kind, name in FILES.items()
        }
    measure_lpj(kernel_of(home, entries["kernel"]))


def read_archive(tar: tarfile.TarFile, work: Path) -> dict[str, dict[str, object]]:
    """Check and unpack a pot into `work`; returns its manifest entries.

    Only the names that a pot has are taken, as plain files, each once; the archive's own
    manifest comes first.  Raises PotError.
    """
    allowed = {f"{kind}/{name}": kind for kind, name in FILES.items()}
    parts: dict[str, dict[str, object]] = {}
    seen: set[str] = set()
    for member in tar:
        if not parts:
            parts = _read_manifest(tar, member)
            continue
        kind = allowed.get(member.name)
        if kind is None or not member.isreg() or kind in seen or member.size > MAX_FILE:
            raise PotError(f"the pot's archive has a member that none has: {member.name!r}")
        seen.add(kind)
        _unpack(tar, member, work / FILES[kind])
        (work / FILES[kind]).chmod(0o755 if kind == "kernel" else 0o644)
        if store.file_digest(work / FILES[kind]) != parts[kind]["digest"]:
            raise PotError(f"the pot's archive is damaged: {member.name} has a wrong digest")
    if seen != set(FILES):
        raise PotError("the pot's archive is not complete")
    return parts


def _read_manifest(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, dict[str, object]]:
    if member.name != MANIFEST or not member.isreg() or member.size > MAX_MANIFEST:
        raise PotError("the archive is not a pot: it does not begin with its manifest")
    stream = tar.extractfile(member)
    assert stream is not None
    try:
        value = json.loads(stream.read())
    except ValueError as error:
        raise PotError("the pot's manifest is damaged") from error
    if not isinstance(value, dict) or value.get("version") != 1:
        raise PotError("the pot is of another version of AppPot", "export it anew")
    parts = {kind: value.get(kind) for kind in FILES}
    for kind, part in parts.items():
        if not isinstance(part, dict) or not isinstance(part.get("digest"), str):
            raise PotError(f"the pot's manifest says nothing of its {kind}")
    kernel = parts["kernel"]
    assert isinstance(kernel, dict)
    if not isinstance(kernel.get("features"), list) or not isinstance(kernel.get("release"), str):
        raise PotError("the pot's manifest does not describe its kernel")
    return {kind: part for kind, part in parts.items() if isinstance(part, dict)}


def _unpack(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    stream = tar.extractfile(member)
    assert stream is not None
    left = member.size
    with open(target, "xb") as file:
        while left and (data := stream.read(min(CHUNK, left))):
            file.write(data)
            left -= len(data)
    if left:
        raise PotError("the pot's archive is truncated", "copy it again")
