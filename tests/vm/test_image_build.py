"""Recipes built in virtual machines, exports that need one, container images that run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from apppot.host.images import store
from apppot.host.images.building import builder, recipe, steps
from apppot.host.images.exporting import export
from apppot.host.images.importing import importer, transports
from apppot.host.images.record import Image, Record
from apppot.host.images.resolve import in_store, resolve
from apppot.host.images.workspace import user_store, workspace

from tests.harness.vm import IMAGE, Launcher

pytestmark = [pytest.mark.timeout(600)]
STEPS = [
    "echo made > /etc/made; ln /etc/made /etc/twin; chown 1000:1000 /etc/made",
    "useradd --system tool; rm /etc/motd; mknod /opt/null c 1 3",
    "cp /bin/true /opt/capable; setfattr -n user.note -v hello /opt/capable || true",
    "mkdir /srv/$(uname -s)",
]


@pytest.fixture
def own_store(base: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store for what is made here; the parent comes from the real one, by its path."""
    monkeypatch.setenv("APPPOT_POT", os.environ.get("APPPOT_POT") or _pot())
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data"


def _pot() -> str:
    from apppot.host.common import paths

    return paths.pot_home()


@pytest.fixture
def base() -> Image:
    """The base image, found before the store is another."""
    return resolve(IMAGE)


def unpack(image: str, target: Path) -> Path:
    subprocess.run(["unsquashfs", "-q", "-n", "-d", str(target), image], check=True)
    return target


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_no_steps_give_the_parent_byte_for_byte(
    base: Image, own_store: Path, tmp_path: Path
) -> None:
    """So nothing of the agent, the caller or the host gets into what is built."""
    target = str(tmp_path / "same")
    steps.build(base, (), b"", (), steps.epoch_of(base), target, "test")
    assert digest(target) == base.digest


@pytest.mark.skipif(os.getuid() != 0, reason="unpacking owners needs root")
def test_steps_change_what_they_say_and_nothing_else(
    base: Image, own_store: Path, tmp_path: Path
) -> None:
    made = [str(tmp_path / name) for name in ("one", "two")]
    for target in made:
        steps.build(base, (), b"", STEPS, steps.epoch_of(base), target, "test")
    assert digest(made[0]) == digest(made[1])
    old, new = unpack(base.path, tmp_path / "old"), unpack(made[0], tmp_path / "new")
    argv = ["diff", "-rq", "--no-dereference", str(old), str(new)]
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    lines = {line for line in said.splitlines() if "special file" not in line}
    accounts = {f"Files {old}/etc/{n} and {new}/etc/{n} differ" for n in _ACCOUNTS}
    assert lines == accounts | {
        *(f"Only in {new}/etc: made", f"Only in {new}/etc: twin", f"Only in {old}/etc: motd"),
        *(f"Only in {new}/opt: null", f"Only in {new}/opt: capable", f"Only in {new}/srv: Linux"),
    }
    for name in _ACCOUNTS:
        before, after = ((root / "etc" / name).read_text() for root in (old, new))
        added = set(after.splitlines()) - set(before.splitlines())
        assert {line.split(":")[0] for line in added} == {"tool"}
        assert after.startswith(before)
    status = os.stat(new / "etc/made")
    assert (status.st_uid, status.st_nlink) == (1000, 2)
    assert status.st_mtime == steps.epoch_of(base)


_ACCOUNTS = ("passwd", "group", "shadow", "gshadow")


def test_a_failing_step_says_so_and_leaves_nothing(base: Image, own_store: Path) -> None:
    from apppot.host.common.errors import BuildError

    text = f'run = ["true", "echo the reason; exit 7"]\n[base]\nparent = "{base.path}"'
    with pytest.raises(BuildError, match="the reason"):
        builder.build(recipe.parse(text, "/r/broken.toml"))
    assert store.list_images() == []


def test_a_recipe_with_files_and_steps(base: Image, own_store: Path) -> None:
    text = (
        'run = ["/usr/local/bin/tool > /var/lib/result"]\n'
        f'[base]\nparent = "{base.path}"\n[image]\ncommand = ["cat", "/var/lib/result"]\n'
        '[files]\n"/usr/local/bin/tool" = { content = "#!/bin/sh\\nuname -r\\n", mode = "0755" }'
    )
    record, cached = builder.build(recipe.parse(text, "/r/tool.toml"))
    assert not cached and record.parent == base.digest
    again, cached = builder.build(recipe.parse(text, "/r/tool.toml"))
    assert cached and again.digest == record.digest
    found = in_store(record).path
    shown = subprocess.run(
        ["unsquashfs", "-cat", found, "var/lib/result"], capture_output=True, check=True
    )
    assert shown.stdout.startswith(b"7.")


def test_a_minimal_root_from_a_tar_runs(own_store: Path, apppot: Launcher) -> None:
    """As Alpine's minirootfs is imported: a small tar without Debian's ways, made here."""
    path = apppot.work / "mini.tar"
    programs = [os.path.realpath(shutil.which(name) or name) for name in ("dash", "cat", "uname")]
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    libraries = {word for word in listed.split() if word.startswith("/") and word[-1] != ":"}
    release = b'PRETTY_NAME="Tiny"\n'
    with tarfile.open(path, "w", dereference=True) as archive:
        for program in programs:
            archive.add(program, f"bin/{os.path.basename(program)}")
        for library in libraries:
            archive.add(library)
        link = tarfile.TarInfo("bin/sh")
        link.type, link.linkname = tarfile.SYMTYPE, "dash"
        archive.addfile(link)
        info = tarfile.TarInfo("etc/os-release")
        info.size = len(release)
        archive.addfile(info, io.BytesIO(release))
    record = importer.import_file(str(path), "mini")
    assert record.distribution == "Tiny"
    out = apppot(in_store(record).path, "sh", "-c", "uname -r; cat /etc/os-release").ok()
    assert out.startswith(b"7.") and out.endswith(release)


@pytest.mark.skipif(shutil.which("sqfs2tar") is None, reason="needs squashfs-tools-ng")
def test_a_container_image_runs_as_docker_runs_it(
    base: Image, own_store: Path, apppot: Launcher, tmp_path: Path
) -> None:
    changed = Record(
        *(base.digest or "", "tool", "3", "squashfs", 0),
        entrypoint=("/bin/echo", "entry"),
        command=("default",),
        env={"GREETING": "hello", "PATH": "/usr/bin:/bin:/only/image"},
        workdir="/var/lib",
        user="games",
    )
    image = Image(base.path, base.format, base.digest, changed, base.probed)
    layout = tmp_path / "layout"
    export._oci(image, str(layout))
    transports.import_reference(f"oci:{layout}")
    reference, env = f"oci:{layout}", {"XDG_DATA_HOME": str(own_store)}
    assert apppot(reference, env=env).ok() == b"entry default\n"
    assert apppot(reference, "other", env=env).ok() == b"entry other\n"
    script = "echo $GREETING $PATH; pwd; id -un"
    out = apppot("--entrypoint", "sh -c", reference, script, env=env).ok()
    assert out == b"hello /usr/bin:/bin:/only/image\n/var/lib\ngames\n"
    out = apppot("--entrypoint", "", "-u", "root", "-w", "/tmp", reference, "pwd", env=env).ok()
    assert out == b"/tmp\n"


@pytest.mark.skipif(shutil.which("sqfs2tar") is None, reason="needs squashfs-tools-ng")
def test_both_ways_to_a_tar_agree(
    base: Image, own_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.export(base.path, "tar", str(tmp_path / "tool.tar"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    export.export(base.path, "tar", str(tmp_path / "guest.tar"))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_DATA_HOME", str(own_store))
    digests = {
        importer.import_file(str(tmp_path / f"{name}.tar")).digest for name in ("tool", "guest")
    }
    assert len(digests) == 1


def test_a_raw_disk_and_a_qcow2_hold_the_image(
    base: Image, own_store: Path, tmp_path: Path, apppot: Launcher
) -> None:
    disk = tmp_path / "disk.img"
    export.export(base.path, "raw", str(disk), export.Wishes(boot=False))
    assert apppot(str(disk), "cat", "/etc/debian_version").ok() == b"12.15\n"
    tree = "find / -xdev -path /home -prune -o -path /etc -prune -o -printf '%p %U %G %m %l %s\\n'"
    script = f"{tree} | grep -v '^/[^/]* ' | grep -v lost+found | grep -v ^/tmp | sort | sha256sum"
    # Directories have other sizes in another file system.
    script = script.replace("%s", "%Ts")
    assert apppot(base.path, "sh", "-c", script).ok() == apppot(str(disk), "sh", "-c", script).ok()
    if shutil.which("qemu-img") is None:
        return
    export.export(base.path, "qcow2", str(tmp_path / "disk.qcow2"), export.Wishes(boot=False))
    argv = ["qemu-img", "info", "--output=json", str(tmp_path / "disk.qcow2")]
    info = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    assert info["format"] == "qcow2" and info["virtual-size"] >= 150 << 20


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="needs skopeo")
def test_skopeo_accepts_an_export(base: Image, own_store: Path, tmp_path: Path) -> None:
    export.export(base.path, "oci", str(tmp_path / "oci"))
    argv = ["skopeo", "inspect", f"oci:{tmp_path}/oci:latest"]
    info = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    assert (info["Os"], info["Architecture"]) == ("linux", "amd64")
    copy = [
        "skopeo",
        "copy",
        "-q",
        f"oci:{tmp_path}/oci:latest",
        f"docker-archive:{tmp_path}/d.tar",
    ]
    subprocess.run(copy, check=True)
    record = transports.import_reference(f"docker-archive:{tmp_path}/d.tar", "back")
    assert record.digest == transports.import_reference(f"oci:{tmp_path}/oci", "there").digest


def test_an_image_in_use_survives_rm(own_store: Path, base: Image, apppot: Launcher) -> None:
    from apppot.host.images import upkeep

    with workspace() as folder:
        copy = os.path.join(folder, "image")
        shutil.copyfile(base.path, copy)
        record = store.add(copy, Record("", "used", "1", "squashfs", 0), base.digest)
    env = {"XDG_DATA_HOME": str(own_store)}
    script = "echo up; read go; find /usr -type f -exec cat {} + | wc -c"
    running = apppot.start("used", "sh", "-c", script, stdin=subprocess.PIPE, env=env)
    assert running.line() == b"up\n"
    assert upkeep.remove(["used"]).kept
    assert os.path.exists(store.blob_path(user_store(), record))
    result = running.finish(b"go\n")
    assert result.status == 0 and int(result.out) > 100 << 20
    assert not upkeep.prune().kept
    assert not os.path.exists(store.blob_path(user_store(), record))
