"""The pot as one file: deterministic to write, checked before anything of it is used."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

from apppot.host.common import unfinished
from apppot.host.common.errors import PotError
from apppot.host.common.files import file_digest
from apppot.host.common.paths import pot_home
from apppot.host.common.progress import Progress
from apppot.host.pot import store
from apppot.host.pot.boot import check_boots, check_boots_in_qemu, measure_lpj
from apppot.host.pot.kernel import kernel_of
from apppot.host.pot.layout import MANIFEST

# kind -> names of its files, the main one first.  The archive holds pot.json and these.
FILES = {
    "kernel": ("linux",),
    "kernel-x86_64": ("vmlinux", "bzImage"),
    "runtime": ("runtime.ext4",),
}
# A pot without these works, for the hypervisors that do not need them.
OPTIONAL = frozenset({"kernel-x86_64"})
MAX_MANIFEST = 1 << 20
MAX_FILE = 4 << 30
CHUNK = 1 << 20


def export_pot(target: str) -> int:
    """Write the kernels and the runtime to a tar; returns its size in bytes.

    The same pot gives the same bytes.  Raises PotError where the pot lacks what every pot has.
    """
    found = {kind: store.current(kind) for kind in FILES}
    parts = {kind: part for kind, part in found.items() if part is not None}
    missing = [kind for kind in FILES if kind not in parts and kind not in OPTIONAL]
    if missing:
        raise PotError(f"the pot has no {' and no '.join(missing)}", "run `apppot pot build`")
    folder, name = os.path.split(os.path.abspath(target))
    try:
        unfinished.sweep(folder, name)
        with Progress("pot: export"), unfinished.making(folder, name) as temporary:
            _write(temporary, parts)
            os.replace(temporary, target)
    except OSError as error:
        raise PotError(f"{target} cannot be written: {error.strerror}") from error
    return os.path.getsize(target)


def _write(path: str, parts: Mapping[str, tuple[Path, Mapping[str, object]]]) -> None:
    """Write the archive; of each kind, the pot that has it and its entry there."""
    manifest = {"version": 1, **{kind: entry for kind, (_, entry) in parts.items()}}
    text = json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(_member(MANIFEST, len(text), 0o644), io.BytesIO(text))
        for kind, (home, entry) in parts.items():
            for name in FILES[kind]:
                _add(tar, f"{kind}/{name}", (home / str(entry["path"])).with_name(name))


def _member(name: str, size: int, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mode = mode
    return member


def _mode(name: str) -> int:
    """Only the User-Mode Linux kernel is a program of this host."""
    return 0o755 if name == "kernel/linux" else 0o644


def _add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    with open(path, "rb") as stream:
        tar.addfile(_member(name, path.stat().st_size, _mode(name)), stream)


def import_pot(source: str) -> None:
    """Put a pot that `export_pot` wrote in the place of ours.

    Nothing changes unless every member is there, safe and of the digest that the manifest says,
    and the kernels boot here.  What the archive lacks stays as it is.  Raises PotError.
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
        if "kernel-x86_64" in parts:
            check_boots_in_qemu(str(work / "vmlinux"))
        entries = {
            kind: store.publish(home, kind, [work / name for name in FILES[kind]], part)
            for kind, part in parts.items()
        }
    measure_lpj(kernel_of(home, entries["kernel"]))


def read_archive(tar: tarfile.TarFile, work: Path) -> dict[str, dict[str, object]]:
    """Check and unpack a pot into `work`; returns its manifest entries.

    Only the names that a pot has are taken, as plain files, each once; the archive's own
    manifest comes first.  Raises PotError.
    """
    parts: dict[str, dict[str, object]] = {}
    wanted: dict[str, str] = {}
    for member in tar:
        if not parts:
            parts = _read_manifest(tar, member)
            wanted = _digests(parts)
            continue
        digest = wanted.pop(member.name, None)
        if digest is None or not member.isreg() or member.size > MAX_FILE:
            raise PotError(f"the pot's archive has a member that none has: {member.name!r}")
        file = work / member.name.partition("/")[2]
        _unpack(tar, member, file)
        file.chmod(_mode(member.name))
        if file_digest(file) != digest:
            raise PotError(f"the pot's archive is damaged: {member.name} has a wrong digest")
    if not parts or wanted:
        raise PotError("the pot's archive is not complete")
    return parts


def _digests(parts: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """Member -> digest, of all that the manifest speaks of; raises PotError where it lacks one."""
    digests: dict[str, str] = {}
    for kind, part in parts.items():
        main, *others = FILES[kind]
        known = part.get("files")
        more = known if isinstance(known, dict) else {}
        for name, digest in ((main, part.get("digest")), *((n, more.get(n)) for n in others)):
            if not isinstance(digest, str):
                raise PotError(f"the pot's manifest says nothing of its {kind}/{name}")
            digests[f"{kind}/{name}"] = digest
    return digests


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
    parts: dict[str, dict[str, object]] = {}
    for kind in FILES:
        part = value.get(kind)
        if part is None and kind in OPTIONAL:
            continue
        if not isinstance(part, dict):
            raise PotError(f"the pot's manifest says nothing of its {kind}")
        described = isinstance(part.get("features"), list) and isinstance(part.get("release"), str)
        if kind != "runtime" and not described:
            raise PotError(f"the pot's manifest does not describe its {kind}")
        parts[kind] = part
    return parts


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
