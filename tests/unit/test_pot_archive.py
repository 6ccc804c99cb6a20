"""The pot as a tar: the same bytes each time, and nothing but a whole, safe one is taken."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from apppot.host.common.errors import PotError
from apppot.host.pot import archive, store

KERNEL, RUNTIME = b"kernel" * 1000, b"runtime" * 1000
VMLINUX, BZIMAGE = b"vmlinux" * 1000, b"bzImage" * 1000


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(**more: object) -> bytes:
    kernel = {"digest": digest(KERNEL), "release": "7.2", "features": [], "path": "k"}
    runtime = {"digest": digest(RUNTIME), "path": "r"}
    return json.dumps({"version": 1, "kernel": kernel, "runtime": runtime, **more}).encode()


def tar_of(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> tarfile.TarFile:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if not name.endswith(".json") and kind != tarfile.REGTYPE:
                member.type, member.linkname = kind, "/etc/passwd"
                tar.addfile(member)
                continue
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    file.seek(0)
    return tarfile.open(fileobj=file, mode="r:")


X86 = {"digest": digest(VMLINUX), "release": "7.2", "features": [], "path": "k"}
GOOD = (("pot.json", manifest()), ("kernel/linux", KERNEL), ("runtime/runtime.ext4", RUNTIME))
BOTH = (
    ("pot.json", manifest(**{"kernel-x86_64": {**X86, "files": {"bzImage": digest(BZIMAGE)}}})),
    ("kernel/linux", KERNEL),
    ("kernel-x86_64/vmlinux", VMLINUX),
    ("kernel-x86_64/bzImage", BZIMAGE),
    ("runtime/runtime.ext4", RUNTIME),
)


def test_a_whole_pot_is_read(tmp_path: Path) -> None:
    parts = archive.read_archive(tar_of(*GOOD), tmp_path)
    assert parts["kernel"]["release"] == "7.2"
    assert (tmp_path / "linux").read_bytes() == KERNEL
    assert (tmp_path / "linux").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "runtime.ext4").read_bytes() == RUNTIME


def test_a_pot_with_both_kernels_is_read(tmp_path: Path) -> None:
    parts = archive.read_archive(tar_of(*BOTH), tmp_path)
    assert set(parts) == {"kernel", "kernel-x86_64", "runtime"}
    assert (tmp_path / "vmlinux").read_bytes() == VMLINUX
    assert (tmp_path / "bzImage").read_bytes() == BZIMAGE


@pytest.mark.parametrize(
    ("members", "why"),
    [
        (GOOD[:2], "not complete"),
        (GOOD[1:], "begin with its manifest"),
        ((*GOOD, ("kernel/linux", KERNEL)), "none has"),
        ((GOOD[0], ("../evil", b"x"), *GOOD[1:]), "none has"),
        ((GOOD[0], ("/etc/passwd", b"x"), *GOOD[1:]), "none has"),
        ((GOOD[0], ("kernel/linux", b"other"), GOOD[2]), "wrong digest"),
        ((("pot.json", b"{"), *GOOD[1:]), "damaged"),
        ((("pot.json", b'{"version": 2}'), *GOOD[1:]), "another version"),
        ((("pot.json", b'{"version": 1}'), *GOOD[1:]), "says nothing"),
        ((*GOOD, BOTH[2]), "none has"),
        (BOTH[:3] + BOTH[4:], "not complete"),
        ((*BOTH[:3], ("kernel-x86_64/bzImage", b"other"), BOTH[4]), "wrong digest"),
        ((("pot.json", manifest(**{"kernel-x86_64": X86})), *BOTH[1:]), "says nothing"),
    ],
)
def test_anything_else_is_refused(
    tmp_path: Path, members: tuple[tuple[str, bytes], ...], why: str
) -> None:
    with pytest.raises(PotError, match=why):
        archive.read_archive(tar_of(*members), tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_nodes_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(PotError, match="none has"):
        archive.read_archive(tar_of(*GOOD, kind=kind), tmp_path)


def put(home: Path, kind: str, files: dict[str, bytes]) -> None:
    home.mkdir(exist_ok=True)
    for name, data in files.items():
        (home / name).write_bytes(data)
    facts = {"release": "7.2", "features": []}
    store.publish(home, kind, [home / name for name in files], facts)


def test_the_same_pot_exports_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "pot", tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("APPPOT_POT", str(home))
    with pytest.raises(PotError, match="no kernel and no runtime"):
        archive.export_pot(str(tmp_path / "0.tar"))
    put(home, "kernel", {"linux": KERNEL})
    put(home, "runtime", {"runtime.ext4": RUNTIME})
    archive.export_pot(str(tmp_path / "0.tar"))
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert set(archive.read_archive(tar, work)) == {"kernel", "runtime"}
    put(home, "kernel-x86_64", {"vmlinux": VMLINUX, "bzImage": BZIMAGE})
    sizes = [archive.export_pot(str(tmp_path / f"{n}.tar")) for n in (1, 2)]
    assert sizes[0] == sizes[1]
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        for old in work.iterdir():
            old.unlink()
        assert set(archive.read_archive(tar, work)) == {"kernel", "kernel-x86_64", "runtime"}
