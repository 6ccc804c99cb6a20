"""The lab's parts: a disk by recipe, in the image store; kernel, Xen and initramfs out of it.

Built once for each state of recipe and scripts, kept in the cache.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from apppot.host.images import store
from apppot.host.images.building import builder, recipe
from apppot.host.images.workspace import user_store
from apppot.host.process.run import run

from tests.lab.initramfs import DIRECTORY, FILE, PROGRAM, cpio
from tests.scenarios.images import alone

ROOT = Path(__file__).resolve().parent.parent.parent
BUSYBOX = "/usr/bin/busybox"
RECIPES = ROOT / "image-recipes" / "lab"
# What the initramfs needs to mount the disk; all else is loaded from there.
MODULES = ("virtio_pci", "virtio_blk", "squashfs", "overlay")
_FOLDERS = ("bin", "sbin", "proc", "dev", "writable", "image", "root", "modules")


@dataclass(frozen=True)
class Parts:
    """Files that QEMU boots the lab from; `digest` is that of all of them."""

    disk: Path
    kernel: Path
    xen: Path
    initramfs: Path
    digest: str


def build() -> Parts:
    """The lab's parts, made where they are missing."""
    with alone("lab", "parts.lock") as cache:
        return _build(cache)


def _build(cache: Path) -> Parts:
    wanted = recipe.load(str(RECIPES / "hypervisor-lab.toml"))
    digest, _ = builder.build(wanted)
    disk = Path(store.blob_path(user_store(), digest))
    scripts = [(RECIPES / name).read_bytes() for name in ("init", "start")]
    key = hashlib.sha256(b"\0".join([disk.name.encode(), *scripts])).hexdigest()
    folder = cache / key[:16]
    parts = Parts(disk, folder / "vmlinuz", folder / "xen", folder / "initramfs", key[:16])
    if not parts.initramfs.exists():
        _make(parts, *scripts)
    return parts


def _make(parts: Parts, init: bytes, start: bytes) -> None:
    parts.kernel.parent.mkdir(parents=True, exist_ok=True)
    listed = run(["unsquashfs", "-l", "-d", "", parts.disk, "boot"]).stdout.decode().split()
    (kernel,) = [path for path in listed if path.startswith("/boot/vmlinuz-")]
    (xen,) = [path for path in listed if path.startswith("/boot/xen-") and path.endswith(".gz")]
    _write(parts.kernel, read_file(parts.disk, kernel))
    _write(parts.xen, gzip.decompress(read_file(parts.disk, xen)))
    tree = f"/usr/lib/modules/{kernel.removeprefix('/boot/vmlinuz-')}"
    entries = [(folder, DIRECTORY, b"") for folder in _FOLDERS]
    busybox = read_file(parts.disk, BUSYBOX)
    entries += [("bin/busybox", PROGRAM, busybox), ("bin/sh", PROGRAM, busybox)]
    entries += [("init", PROGRAM, init), ("start", PROGRAM, start)]
    order = load_order(read_file(parts.disk, f"{tree}/modules.dep").decode(), MODULES)
    for path in order:
        entries.append(
            (f"modules/{path.rpartition('/')[2]}", FILE, read_file(parts.disk, f"{tree}/{path}"))
        )
    names = "".join(path.rpartition("/")[2] + "\n" for path in order)
    entries.append(("modules/order", FILE, names.encode()))
    _write(parts.initramfs, cpio(entries))


def load_order(dependencies: str, names: tuple[str, ...]) -> list[str]:
    """Paths of the modules and what they need, from modules.dep, what is needed first."""
    needs: dict[str, list[str]] = {}
    for line in dependencies.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
    by_name = {path.rpartition("/")[2].partition(".")[0].replace("-", "_"): path for path in needs}
    order: list[str] = []

    def add(path: str) -> None:
        for need in needs[path]:
            add(need)
        if path not in order:
            order.append(path)

    for name in names:
        add(by_name[name])
    return order


def read_file(disk: Path, path: str) -> bytes:
    return run(["unsquashfs", "-cat", disk, path.lstrip("/")]).stdout


def _write(path: Path, data: bytes) -> None:
    """Complete or not at all: what exists is taken for finished."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.rename(path)
