"""Container images: OCI layouts and `docker save` archives made here, by umoci and by skopeo."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apppot.host.common.errors import ImageError
from apppot.host.images import store
from apppot.host.images.importing import transports
from apppot.host.images.record import Record
from apppot.host.images.resolve import in_store, resolve

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(shutil.which("sqfstar") is None, reason="no squashfs-tools"),
]
Member = tuple[tarfile.TarInfo, bytes]
CAPABILITY = b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("APPPOT_SITE_STORE", str(tmp_path / "site"))


def member(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **more: Any) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    info.mtime = 1_600_000_000
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def tar(*members: Member) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


LOWER = tar(
    member("bin", tarfile.DIRTYPE),
    member("bin/tool", content=b"#!/bin/sh\necho old\n", mode=0o4755, uid=7, gid=8),
    member("bin/twin", tarfile.LNKTYPE, linkname="bin/tool"),
    member("etc", tarfile.DIRTYPE, mode=0o750),
    member("etc/gone", content=b"gone"),
    member("etc/kept", content=b"kept"),
    member("opaque", tarfile.DIRTYPE),
    member("opaque/old", content=b"old"),
    member("lib", tarfile.SYMTYPE, linkname="usr/lib"),
    member("usr/lib", tarfile.DIRTYPE),
    member("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
    member("was-file", content=b"file"),
    member("was-dir/x", content=b"x"),
)
UPPER = tar(
    member("bin/.wh.tool"),
    member("etc/.wh.gone"),
    member("opaque/new", content=b"new"),
    member("opaque/.wh..wh..opq"),
    member("lib/added", content=b"through the link"),
    member("was-file", tarfile.DIRTYPE),
    member("was-file/inside", content=b"i"),
    member("was-dir", content=b"now a file"),
    member("etc/kept2", tarfile.LNKTYPE, linkname="etc/kept"),
    member(
        "bin/ping",
        content=b"ping",
        pax_headers={
            "SCHILY.xattr.security.capability": CAPABILITY.decode("utf-8", "surrogateescape"),
            "SCHILY.xattr.user.note": "hello",
        },
    ),
)
CONFIG = {
    "Env": ["PATH=/opt/bin:/bin", "GREETING=hello world"],
    "Entrypoint": ["/bin/echo"],
    "Cmd": ["one", "two"],
    "WorkingDir": "/data",
    "User": "1234:100",
}


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layout(folder: Path, *layers: bytes, compression: str = "gzip", tag: str = "1") -> Path:
    """An OCI layout with these plain layers."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(data: bytes) -> dict[str, Any]:
        (blobs / sha256(data)[7:]).write_bytes(data)
        return {"digest": sha256(data), "size": len(data)}

    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": CONFIG,
        "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
    }
    kinds = {"": "", "gzip": "+gzip", "zstd": "+zstd"}
    media = f"application/vnd.oci.image.layer.v1.tar{kinds[compression]}"
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            **put(json.dumps(config).encode()),
        },
        "layers": [{"mediaType": media, **put(packed(layer, compression))} for layer in layers],
    }
    entry = {"mediaType": manifest["mediaType"], **put(json.dumps(manifest).encode())}
    entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
    index = folder / "index.json"
    there = json.loads(index.read_text())["manifests"] if index.exists() else []
    index.write_text(json.dumps({"schemaVersion": 2, "manifests": [*there, entry]}))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return folder


def packed(layer: bytes, compression: str) -> bytes:
    if compression == "gzip":
        return gzip.compress(layer, mtime=0)
    if compression == "zstd":
        return subprocess.run(["zstd", "-c"], input=layer, capture_output=True, check=True).stdout
    return layer


def listing(record: Record) -> dict[str, str]:
    """path → "mode owner size-or-device [-> target]" of everything in an image."""
    path = in_store(record).path
    done = subprocess.run(["unsquashfs", "-lln", path], capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        if "squashfs-root" in line:
            left, _, name = line.partition("squashfs-root")
            words = re.sub(r",\s+", ",", left).split()
            place, arrow, target = name.partition(" -> ")
            found[place] = " ".join([*words[:3], *([target] if arrow else [])])
    return found


def content(record: Record, path: str) -> bytes:
    argv = ["unsquashfs", "-cat", in_store(record).path, path]
    return subprocess.run(argv, capture_output=True, check=True).stdout


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_layers_merge_exactly(tmp_path: Path, compression: str) -> None:
    folder = layout(tmp_path / "layout", LOWER, UPPER, compression=compression)
    record = transports.import_reference(f"oci:{folder}")
    assert (record.name, record.version) == ("layout", "1")
    there = listing(record)
    assert {path for path in there if path} == {
        *("/bin", "/bin/twin", "/bin/ping", "/etc", "/etc/kept", "/etc/kept2", "/opaque"),
        *("/opaque/new", "/lib", "/usr", "/usr/lib", "/usr/lib/added", "/dev", "/dev/null"),
        *("/was-file", "/was-file/inside", "/was-dir", "/data"),
    }
    assert there["/bin/twin"] == "-rwsr-xr-x 7/8 19"  # its contents came under a name that went
    assert content(record, "bin/twin") == b"#!/bin/sh\necho old\n"
    assert there["/lib"].endswith("usr/lib")
    assert there["/dev/null"] == "crw-rw-rw- 0/0 1,3"
    assert there["/etc"].startswith("drwxr-x---")
    assert content(record, "usr/lib/added") == b"through the link"
    assert content(record, "etc/kept2") == b"kept"
    assert content(record, "was-dir") == b"now a file"


def test_attributes_arrive(tmp_path: Path) -> None:
    record = transports.import_reference(f"oci:{layout(tmp_path / 'l', LOWER, UPPER)}")
    path = in_store(record).path
    target = tmp_path / "out"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", str(target), path], check=os.getuid() == 0)
    if os.getuid() != 0:
        pytest.skip("only root can see capabilities unpacked")
    assert os.getxattr(target / "bin/ping", "security.capability") == CAPABILITY
    assert os.getxattr(target / "bin/ping", "user.note") == b"hello"
    kept, twin = os.stat(target / "etc/kept"), os.stat(target / "etc/kept2")
    assert (kept.st_ino, kept.st_nlink) == (twin.st_ino, 2)
    assert kept.st_mtime == 1_600_000_000


def test_the_configuration_is_kept(tmp_path: Path) -> None:
    record = transports.import_reference(f"oci:{layout(tmp_path / 'l', LOWER, UPPER)}")
    assert record.env == {"PATH": "/opt/bin:/bin", "GREETING": "hello world"}
    assert (record.entrypoint, record.command) == (("/bin/echo",), ("one", "two"))
    assert (record.workdir, record.user) == ("/data", "1234:100")


def test_compression_does_not_change_the_image(tmp_path: Path) -> None:
    digests = {
        transports.import_reference(
            f"oci:{layout(tmp_path / f'l{kind}', LOWER, UPPER, compression=kind)}"
        ).digest
        for kind in ("", "gzip", "zstd")
    }
    assert len(digests) == 1


def test_an_image_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = layout(tmp_path / "l", LOWER)
    first = resolve(f"oci:{folder}")
    monkeypatch.setattr(transports, "import_reference", None)
    assert resolve(f"oci:{folder}").digest == first.digest


def test_tags_choose(tmp_path: Path) -> None:
    folder = layout(tmp_path / "l", LOWER, tag="a")
    layout(folder, LOWER, UPPER, tag="b")
    one, two = (transports.import_reference(f"oci:{folder}:{tag}") for tag in "ab")
    assert one.digest != two.digest
    assert (one.version, two.version) == ("a", "b")
    for tag in ("", ":c"):
        with pytest.raises(ImageError, match="a, b"):
            transports.import_reference(f"oci:{folder}{tag}")


def test_damage_is_noticed(tmp_path: Path) -> None:
    folder = layout(tmp_path / "l", LOWER, UPPER)
    for blob in list((folder / "blobs" / "sha256").iterdir()):
        data = blob.read_bytes()
        blob.write_bytes(data[:-40] + b"!" + data[-39:])
        with pytest.raises(ImageError):
            transports.import_reference(f"oci:{folder}")
        blob.unlink()
        with pytest.raises(ImageError):
            transports.import_reference(f"oci:{folder}")
        blob.write_bytes(data)
    assert store.list_images() == []
    transports.import_reference(f"oci:{folder}")


def docker_save(path: Path, *layers: bytes, linked: bool = False) -> Path:
    """What `docker save` writes; with `linked` a layer is a link to another one's file."""
    config = json.dumps(
        {"config": CONFIG, "rootfs": {"diff_ids": [sha256(layer) for layer in layers]}}
    ).encode()
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": f"{sha256(config)[7:]}.json", "RepoTags": ["a/tool:3"], "Layers": names}]
    members = [member(name, content=layer) for name, layer in zip(names, layers, strict=True)]
    if linked:
        members[1] = member(names[1], tarfile.SYMTYPE, linkname="../0/layer.tar")
    members.append(member(f"{sha256(config)[7:]}.json", content=config))
    members.append(member("manifest.json", content=json.dumps(manifest).encode()))
    path.write_bytes(tar(*members))
    return path


def test_docker_archives_give_the_same_image(tmp_path: Path) -> None:
    archive = docker_save(tmp_path / "saved.tar", LOWER, UPPER)
    record = transports.import_reference(f"docker-archive:{archive}")
    assert (record.name, record.version) == ("tool", "3")
    assert (
        record.digest
        == transports.import_reference(f"oci:{layout(tmp_path / 'l', LOWER, UPPER)}").digest
    )
    (tmp_path / "saved.tar.gz").write_bytes(gzip.compress(archive.read_bytes()))
    again = transports.import_reference(f"docker-archive:{tmp_path}/saved.tar.gz:a/tool:3", "x:1")
    assert again.digest == record.digest
    with pytest.raises(ImageError, match="a/tool:3"):
        transports.import_reference(f"docker-archive:{archive}:b:1")


def test_a_layer_that_is_a_link_is_followed(tmp_path: Path) -> None:
    archive = docker_save(tmp_path / "saved.tar", LOWER, LOWER, linked=True)
    record = transports.import_reference(f"docker-archive:{archive}")
    assert content(record, "etc/gone") == b"gone"


def test_a_damaged_docker_archive_is_noticed(tmp_path: Path) -> None:
    archive = docker_save(tmp_path / "saved.tar", LOWER, UPPER)
    data = archive.read_bytes().replace(b"through the link", b"through the lynx")
    archive.write_bytes(data)
    with pytest.raises(ImageError, match="damaged"):
        transports.import_reference(f"docker-archive:{archive}")
    assert store.list_images() == []


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """Debian's docker-registry on the loopback."""
    if not all(map(shutil.which, ("docker-registry", "skopeo"))):
        pytest.skip("needs docker-registry and skopeo")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "registry.yml"
    config.write_text(
        "version: 0.1\nlog: {level: error}\n"
        f"storage: {{filesystem: {{rootdirectory: {tmp_path}/registry}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with subprocess.Popen(
        ["docker-registry", "serve", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            _await(port)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


def _await(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the registry does not answer")


def test_from_a_registry(tmp_path: Path, registry: str) -> None:
    folder = layout(tmp_path / "l", LOWER, UPPER)
    name = f"{registry}/team/tool:2.5"
    subprocess.run(
        ["skopeo", "copy", "-q", "--dest-tls-verify=false", f"oci:{folder}:1", f"docker://{name}"],
        check=True,
    )
    found = resolve(f"docker://{name}")
    assert found.record is not None
    assert (found.record.name, found.record.version) == ("tool", "2.5")
    assert found.digest == transports.import_reference(f"oci:{folder}").digest
    assert found.record.entrypoint == ("/bin/echo",)
    with pytest.raises(ImageError, match="cannot be fetched"):
        resolve(f"docker://{registry}/team/other:1")


@pytest.mark.skipif(os.getuid() != 0, reason="umoci without root changes owners")
def test_umoci_sees_the_same_tree(tmp_path: Path) -> None:
    """An independent reader of the same layers is the judge."""
    if shutil.which("umoci") is None:
        pytest.skip("needs umoci")
    folder = layout(tmp_path / "l", LOWER, UPPER)
    record = transports.import_reference(f"oci:{folder}")
    subprocess.run(["umoci", "unpack", "--image", f"{folder}:1", str(tmp_path / "b")], check=True)
    expected = set()
    for place, folders, files in os.walk(tmp_path / "b" / "rootfs"):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            status = os.lstat(path)
            expected.add((path.partition("/rootfs")[2], status.st_uid, status.st_gid))
    ours = {
        (path, *map(int, words.split()[1].split("/")))
        for path, words in listing(record).items()
        if path not in ("", "/data")
    }
    assert ours == expected
