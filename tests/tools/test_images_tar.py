"""Tar imports with the real packer: exact trees, stable digests, hostile archives."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from apppot.host.common.errors import ImageError
from apppot.host.common.files import file_digest
from apppot.host.images import store
from apppot.host.images.importing import importer
from apppot.host.images.resolve import in_store, resolve

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(shutil.which("sqfstar") is None, reason="no squashfs-tools"),
]
MEBI = 1 << 20


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("APPPOT_SITE_STORE", str(tmp_path / "site"))
    return tmp_path / "data" / "apppot" / "images"


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **more: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for key, value in more.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT)


def put(path: Path, *parts: bytes) -> str:
    path.write_bytes(b"".join(parts) + bytes(1024))
    return str(path)


def snapshot(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "parts",
    [
        (header("../outside", size=1), b"x".ljust(512, b"\0")),
        (header("l", tarfile.SYMTYPE, linkname="/tmp"), header("l/../../outside")),
        (header("hard", tarfile.LNKTYPE, linkname="/etc/shadow"),),
        (header("f", size=4000), b"short"),
        (header("ok"), b"\xff" * 512),
        (header("ok"), b"garbage that is no header".ljust(512, b"!")),
        (header("huge", size=1 << 50),),
        (header("x", tarfile.XHDTYPE, size=1 << 40),),
        (header("x", tarfile.GNUTYPE_LONGNAME, size=1 << 40),),
        (header("x", tarfile.XHDTYPE, size=512), b"99999 path=evil\n".ljust(512, b"\0")),
    ],
)
def test_hostile_archives_are_errors_and_touch_nothing(
    tmp_path: Path, own_store: Path, parts: tuple[bytes, ...]
) -> None:
    path = put(tmp_path / "evil.tar", *parts)
    before = snapshot(tmp_path)
    with pytest.raises(ImageError):
        importer.import_file(path)
    assert store.list_images() == []
    new = snapshot(tmp_path) - before
    assert all(place.startswith(str(tmp_path / "data")) for place in new)
    assert os.listdir(own_store / "tmp") == []


def test_a_symbolic_link_leads_nowhere_outside(tmp_path: Path) -> None:
    target = tmp_path / "victim"
    target.mkdir()
    path = put(
        tmp_path / "evil.tar",
        header("l", tarfile.SYMTYPE, linkname=str(target)),
        header("l/evil", size=4),
        b"evil".ljust(512, b"\0"),
    )
    record = importer.import_file(path)
    assert os.listdir(target) == []
    shown = subprocess.run(
        ["unsquashfs", "-cat", in_store(record).path, f"{target}/evil".lstrip("/")],
        capture_output=True,
        check=True,
    )
    assert shown.stdout == b"evil"


def test_the_digest_does_not_depend_on_when_or_how(tmp_path: Path) -> None:
    """No parent directories in the archive: they get fixed attributes, not today's time."""
    members = (header("a/b/c", size=3, mtime=5), b"abc".ljust(512, b"\0"), header("x/y/z"))
    first = importer.import_file(put(tmp_path / "one.tar", *members))
    time.sleep(1.1)
    (tmp_path / "two.tar.gz").write_bytes(gzip.compress(b"".join(members) + bytes(1024)))
    second = importer.import_file(str(tmp_path / "two.tar.gz"))
    script = """
import sys; from apppot.host.images.importing import importer
print(importer.import_file('-', 'three').digest)
"""
    third = subprocess.run(
        [sys.executable, "-c", script],
        input=b"".join(members) + bytes(1024),
        capture_output=True,
        check=True,
    )
    assert first.digest == second.digest == third.stdout.decode().strip()


def test_the_last_of_several_members_of_a_name_wins(tmp_path: Path) -> None:
    parts = [header("f", size=3) + word.ljust(512, b"\0") for word in (b"one", b"two")]
    record = importer.import_file(put(tmp_path / "d.tar", *parts))
    argv = ["unsquashfs", "-cat", in_store(record).path, "f"]
    assert subprocess.run(argv, capture_output=True, check=True).stdout == b"two"


def test_sparse_members_and_bombs_stay_small(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.seek(200 * MEBI)
        file.write(b"end")
        file.truncate(300 * MEBI)
    for form in ("gnu", "posix"):
        path = tmp_path / f"{form}.tar"
        argv = ["tar", f"--format={form}", "-S", "-C", str(tmp_path), "-cf", str(path), "sparse"]
        subprocess.run(argv, check=True)
        assert path.stat().st_size < MEBI
        record = importer.import_file(str(path))
        assert record.size < MEBI
        target = tmp_path / f"out-{form}"
        argv = ["unsquashfs", "-q", "-n", "-d", str(target), in_store(record).path]
        subprocess.run(argv, check=True)
        subprocess.run(["cmp", str(sparse), str(target / "sparse")], check=True)


@pytest.mark.parametrize(
    "key", ["SCHILY.acl.access", "SCHILY.xattr.system.posix_acl_default", "SCHILY.xattr.user.note"]
)
def test_access_lists_that_are_dropped_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    with_list = header("f", pax_headers={key: "user::rwx,user:5:r--,group::r--,other::---"})
    importer.import_file(put(tmp_path / "x.tar", header("g"), with_list))
    told = "lists of 1 files are not kept" in capsys.readouterr().err
    assert told is ("acl" in key)


@pytest.mark.timeout(300)
def test_highly_compressed_members_cost_neither_memory_nor_disk(tmp_path: Path) -> None:
    """Half a gigabyte of zeros in a few megabytes."""
    packed = tmp_path / "bomb.tar.gz"
    with gzip.open(packed, "wb", compresslevel=1) as out:
        out.write(header("zeros", size=512 * MEBI))
        for _ in range(512):
            out.write(bytes(MEBI))
        out.write(bytes(1024))
    script = f"""
import resource; from apppot.host.images.importing import importer
print(importer.import_file({str(packed)!r}).size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    size, memory = map(int, done.stdout.split())
    assert size < 8 * MEBI and memory < 250 * 1024


def test_odd_names_survive(tmp_path: Path) -> None:
    names = [b"new\nline", b"esc\x1b[31m", b"\xff\xfe latin", "ünï".encode(), b"n" * 255, b" "]
    names.append(b"/".join([b"deep" * 20] * 12))
    tree = tmp_path / "tree"
    for name in names:
        path = os.fsencode(tree) + b"/" + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(name)
    argv = ["tar", "--format=gnu", "-C", str(tree), "-cf", str(tmp_path / "t.tar"), "."]
    subprocess.run(argv, check=True)
    record = importer.import_file(str(tmp_path / "t.tar"))
    out = tmp_path / "out"
    argv = ["unsquashfs", "-q", "-n", "-d", str(out), in_store(record).path]
    subprocess.run(argv, check=True)
    subprocess.run(["diff", "-r", str(tree), str(out)], check=True)


@pytest.mark.timeout(300)
def test_many_entries_take_bounded_memory_and_time(tmp_path: Path) -> None:
    count = 100_000
    with tarfile.open(tmp_path / "many.tar", "w") as archive:
        for number in range(count):
            archive.addfile(tarfile.TarInfo(f"d{number % 997}/f{number}"), io.BytesIO())
    script = f"""
import resource, sys; from apppot.host.images.importing import importer
importer.import_file({str(tmp_path / "many.tar")!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(done.stdout) < 250 * 1024  # KiB
    assert time.monotonic() - started < 120


def test_kill_at_any_moment_leaves_nothing_half_made(tmp_path: Path, own_store: Path) -> None:
    data = os.urandom(8 * MEBI)
    path = put(tmp_path / "big.tar", header("f", size=len(data)), data)
    script = (
        f"from apppot.host.images.importing import importer; importer.import_file({path!r}, 'big')"
    )
    for delay in (0.1, 0.2, 0.3, 0.4, 0.6):
        with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL) as job:
            time.sleep(delay)
            job.kill()
        for _, record in store.list_images():
            # Between the image and its name, it is whole and has none.
            reference = f"{record.name}:{record.version}" if record.version else record.digest
            assert resolve(reference).digest == record.digest
            assert file_digest(in_store(record).path) == record.digest
    assert importer.import_file(path, "big").size > 8 * MEBI
