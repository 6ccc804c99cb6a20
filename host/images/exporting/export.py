"""Images for other tools: tar, OCI layout, and disks, which boot or hold one ext4 file system.

A squashfs becomes a tar by squashfs-tools-ng where that is installed; all else is read by a
virtual machine, which mounts the image and needs no root for the owners in it.  What is written
takes its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from apppot.host.common.errors import ImageError, UsageError
from apppot.host.common.frozen import frozen
from apppot.host.common.progress import Progress
from apppot.host.images.importing.oci import MACHINES, REFERENCE
from apppot.host.images.probe import ImageFormat, require_bootable
from apppot.host.images.record import HOST_IMAGE, Image
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import hold
from apppot.host.process import run
from apppot.host.process.launcher import GuestCommand, GuestCommandError, complete

DISKS = ("raw", "qcow2", "vdi", "vmdk", "ova")
ONLY_BOOTABLE = ("vdi", "vmdk", "ova")
CHUNK = 1 << 20
TIMEOUT = 6 * 3600.0
# Folders and not files: where only Landlock confines, a single file cannot be shown.
GUEST_IMAGES, GUEST_DISK = "/mnt/apppot-images", "/mnt/apppot-disk"
# $1: file system, $2: mount options, $3 image, $4 disk to write.  `host` is the system of this
# script: GNU tools.
MOUNT = f"""set -eu
mkdir -p /run/export/image /run/export/disk
mount -t "$1" -o "$2" "{GUEST_IMAGES}/$3" /run/export/image
"""
TAR_SCRIPT = (
    MOUNT
    + """exec tar -C /run/export/image --numeric-owner --xattrs '--xattrs-include=*' --sort=name \\
    --format=pax --pax-option=delete=atime,delete=ctime -cf - .
"""
)
# The size: contents, a block for each file's end, a fifth of room, and tables.
DISK_SCRIPT = (
    MOUNT
    + f"""exec >&2
cd /run/export/image
files=$(find . -xdev | wc -l)
kbytes=$(du -sk --apparent-size . | cut -f1)
kbytes=$(((kbytes + 4 * files) * 6 / 5 + 65536))
disk="{GUEST_DISK}/$4"
truncate -s "${{kbytes}}K" "$disk"
mke2fs -q -F -t ext4 -m 0 -N $((files * 5 / 4 + 4096)) "$disk"
mount -o loop "$disk" /run/export/disk
cp -a . /run/export/disk
umount /run/export/disk
"""
)


@frozen
class Wishes:
    """How a disk is to be: whether it boots; with which changes over the image, lowest first;
    with how many bytes for what jobs write, 0 for the machine's memory.
    """

    boot: bool = True
    changes: tuple[str, ...] = ()
    scratch: int = 0


def export(reference: str, form: str, output: str, wishes: Wishes | None = None) -> None:
    """Write the image `reference` to the new file (for `oci` directory) `output`.

    Raises ImageError, PotError, and UsageError where `output` is there already or the wishes do
    not go together.
    """
    wishes = wishes or Wishes()
    _check(form, wishes)
    image = resolve(reference)
    if os.path.lexists(output):
        raise UsageError(f"{output!r} is there already", "remove it, or name another -o")
    writers: dict[str, Callable[[Image, str], None]] = {
        "tar": _tar,
        "oci": _oci,
        "raw": _raw,
        "qcow2": _qcow2,
    }
    folder = os.path.dirname(os.path.abspath(output))
    try:
        work = tempfile.mkdtemp(dir=folder, prefix=".apppot-export-")
    except OSError as error:
        raise ImageError(f"{folder} cannot be written: {error.strerror}") from None
    held = hold(image.path)
    try:
        with Progress(f"exporting {reference} to {output}") as progress:
            made = os.path.join(work, "result")
            if form in DISKS and wishes.boot:
                _bootable(image, form, made, wishes, progress)
            else:
                writers[form](image, made)
            os.rename(made, output)
    finally:
        os.close(held)
        shutil.rmtree(work, ignore_errors=True)


def _check(form: str, wishes: Wishes) -> None:
    if form in ONLY_BOOTABLE and not wishes.boot:
        raise UsageError(f"--no-boot knows no {form}", "raw or qcow2; a disk that boots is any")
    if (wishes.changes or wishes.scratch) and (form not in DISKS or not wishes.boot):
        hint = f"one of --format {', '.join(DISKS)}"
        raise UsageError("changes and scratch space go on a disk that boots", hint)


# --- tar ---------------------------------------------------------------------------------------


def _tar(image: Image, target: str) -> None:
    with open(target, "xb") as out:
        write_tar(image, out.fileno())


def write_tar(image: Image, descriptor: int) -> None:
    """Write the image's files as a tar into `descriptor`, with owners, links and attributes."""
    if image.format is ImageFormat.SQUASHFS and shutil.which("sqfs2tar"):
        argv = ["sqfs2tar", "--root-becomes", ".", image.path]
        run.run(argv, stdout=descriptor, timeout=TIMEOUT)
        return
    _in_guest(image, TAR_SCRIPT, descriptor)


def _in_guest(image: Image, script: str, descriptor: int, disk: str = "") -> None:
    """Run `script` as root in a guest on this host's system, which sees the image and `disk`."""
    kind = image.format.file_system
    options = "ro,loop" + (f",offset={image.probed.offset}" if image.probed.offset else "")
    options += ",noload" if kind == "ext4" else ""
    source = os.path.realpath(image.path)
    binds = [f"{os.path.dirname(source)}:{GUEST_IMAGES}:ro"]
    if disk:
        binds.append(f"{os.path.dirname(os.path.realpath(disk))}:{GUEST_DISK}")
    names = (os.path.basename(source), os.path.basename(disk))
    command = GuestCommand(
        HOST_IMAGE, ("/bin/sh", "-c", script, "sh", kind, options, *names), binds=tuple(binds)
    )
    try:
        complete(command, stdout=descriptor)
    except GuestCommandError as error:
        raise ImageError(f"the guest could not read the image: {error.cause}") from None


# --- OCI ---------------------------------------------------------------------------------------


def _oci(image: Image, target: str) -> None:
    blobs = os.path.join(target, "blobs", "sha256")
    os.makedirs(blobs)
    layer = os.path.join(blobs, "layer")
    content = hashlib.sha256()
    with _tar_pipe(image) as reader:
        digest, size = _compress(reader, layer, content.update)
    os.rename(layer, os.path.join(blobs, digest))
    config = _put(blobs, _configuration(image, content.hexdigest()))
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config},
        "layers": [
            {
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": f"sha256:{digest}",
                "size": size,
            }
        ],
    }
    entry = {"mediaType": manifest["mediaType"], **_put(blobs, manifest)}
    entry["annotations"] = {REFERENCE: image.record.version if image.record else "latest"}
    _write_json(os.path.join(target, "index.json"), {"schemaVersion": 2, "manifests": [entry]})
    _write_json(os.path.join(target, "oci-layout"), {"imageLayoutVersion": "1.0.0"})


@contextmanager
def _tar_pipe(image: Image) -> Iterator[int]:
    """The reading end of a pipe with the image's tar."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    failure: list[BaseException] = []

    def write() -> None:
        try:
            write_tar(image, writer)
        except BaseException as error:
            failure.append(error)
        finally:
            os.close(writer)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield reader
    finally:
        os.close(reader)
        thread.join()
    if failure:
        raise failure[0]


def _compress(reader: int, path: str, plain: Callable[[bytes], None]) -> tuple[str, int]:
    """Write the pipe's bytes to `path` as gzip without a date; (SHA-256, size in bytes)."""
    digest, size = hashlib.sha256(), 0
    squeeze = zlib.compressobj(6, zlib.DEFLATED, 31)
    with open(path, "xb") as out:
        while True:
            data = os.read(reader, CHUNK)
            plain(data)
            packed = squeeze.compress(data) if data else squeeze.flush()
            digest.update(packed)
            size += out.write(packed)
            if not data:
                return digest.hexdigest(), size


def _configuration(image: Image, content: str) -> dict[str, Any]:
    record = image.record
    wishes: dict[str, Any] = {}
    if record is not None:
        wishes = {
            "Env": [f"{name}={value}" for name, value in sorted(record.env.items())],
            "Entrypoint": list(record.entrypoint),
            "Cmd": list(record.command),
            "WorkingDir": record.workdir,
            "User": record.user,
        }
    return {
        "created": record.created if record else "1970-01-01T00:00:00Z",
        "architecture": MACHINES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {key: value for key, value in wishes.items() if value},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{content}"]},
        "history": [{"created_by": "apppot image export"}],
    }


def _put(blobs: str, value: object) -> dict[str, Any]:
    data = json.dumps(value, sort_keys=True).encode()
    digest = hashlib.sha256(data).hexdigest()
    with open(os.path.join(blobs, digest), "wb") as file:
        file.write(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def _write_json(path: str, value: object) -> None:
    with open(path, "w", encoding="ascii") as file:
        json.dump(value, file)


# --- disks -------------------------------------------------------------------------------------


def _bootable(image: Image, form: str, target: str, wishes: Wishes, progress: Progress) -> None:
    from apppot.host.images.exporting import disk, ova

    if form != "raw":
        _require_qemu_img(form)
    over = disk.resolve_changes(wishes.changes, image)
    for one in (image, *over):
        require_bootable(one.probed, one.path)
    raw = target if form == "raw" else f"{target}.raw"
    work = os.path.dirname(target)
    identity = disk.write(image, over, raw, work, wishes.scratch, progress)
    match form:
        case "raw":
            return
        case "ova":
            name = image.record.name if image.record else os.path.basename(image.path)
            ova.write(raw, target, work, name.split(".")[0], identity)
        case _:
            ova.convert(raw, form, target, identity)


def _require_qemu_img(form: str) -> None:
    if shutil.which("qemu-img") is None:
        raise ImageError(f"qemu-img, which writes {form}, is missing", "apt-get install qemu-utils")


def _raw(image: Image, target: str) -> None:
    with open(target, "xb"):
        pass  # the guest gives it its length
    with open(os.devnull, "wb") as nowhere:
        _in_guest(image, DISK_SCRIPT, nowhere.fileno(), target)


def _qcow2(image: Image, target: str) -> None:
    _require_qemu_img("qcow2")
    raw = f"{target}.raw"
    _raw(image, raw)
    run.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, target], timeout=TIMEOUT)
