"""QEMU's emulation: our kernel, and Debian's kernel with the initrd that Debian makes of it.

Both run the same image, in a machine with one CPU (`-cpu max`) and the same memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from apppot.host.images.building import builder, recipe
from apppot.host.images.exporting.export import Wishes, export
from apppot.host.images.resolve import resolve
from apppot.host.pot.layout import find_x86_kernel
from apppot.host.process.run import run

from benchmarks.boot import parts, ratios
from benchmarks.machines import HERE, Bench, apppot_run
from benchmarks.measure import BenchmarkError, Row, interleaved, row, until_line

# Of the time that Debian's kernel takes, from the goals.
SHARE = 1 / 3
MEMORY = "512"  # MB
GROUP = "emulation"


@dataclass(frozen=True)
class Debian:
    """An image with Debian's kernel, and what a machine boots it with."""

    image: str
    release: str
    kernel: Path
    initrd: Path
    disk: Path


def measure(given: Bench) -> list[Row]:
    """Rows about the start of a payload on QEMU without KVM."""
    debian = prepare(given.folder)
    subjects = {
        "ours": lambda: ours(given.folder, debian),
        "debian": lambda: {"output": until_line(pc(debian), debian.release, given.folder)},
    }
    found = interleaved(subjects, given.rounds(3, 7))
    steps, theirs = found["ours"], found["debian"]["output"]
    whole, against = steps["output"], "Debian's"
    return [
        row(GROUP, "Debian's kernel and initrd: QEMU's start to the payload's output", theirs, "s"),
        row(GROUP, "`apppot run`: the command's start to the payload's output", whole, "s",
            base=theirs, against=against),
        row(GROUP, "the same, as part of Debian's", ratios(whole, theirs), "×", budget=SHARE),
        row(GROUP, "`apppot run`: QEMU's start to the payload's exec",
            steps["hypervisor to payload"], "s", base=theirs, against=against),
        row(GROUP, "of that: kernel, and Python's start", steps["step kernel: kernel"], "s"),
        row(GROUP, "of that: agent", steps["agent"], "s"),
    ]  # fmt: skip


def ours(folder: Path, debian: Debian) -> Mapping[str, float]:
    """One run by the launcher: seconds to its output, and of its parts."""
    report = folder / "timeline.json"
    options = ("--hypervisor", "qemu", "--no-warm", "--network", "none", "--mem", f"{MEMORY}M")
    argv = apppot_run(debian.image, "uname", "-r", options=(*options, "--timeline", str(report)))
    release = find_x86_kernel().release
    return {"output": until_line(argv, release, folder), **parts(report)}


def pc(debian: Debian) -> list[str]:
    """QEMU's command line: the job's words stand on the kernel's, as docs/images.md shows."""
    words = "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/sbin/apppot-init -- uname -r"
    argv = ["qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "max", "-m", MEMORY]
    argv += ["-nographic", "-nic", "none", "-no-reboot"]
    # Written to a temporary file: each run finds the same disk.
    argv += ["-drive", f"file={debian.disk},if=virtio,format=raw,snapshot=on"]
    argv += ["-kernel", str(debian.kernel), "-initrd", str(debian.initrd)]
    return [*argv, "-append", words]


def prepare(folder: Path) -> Debian:
    """The image of cloud-kernel.toml, built if need be: its kernel, initrd, and it as a disk."""
    record, _ = builder.build(recipe.load(str(HERE / "cloud-kernel.toml")))
    image = resolve(record.digest).path
    listed = run(["unsquashfs", "-l", image, "boot"]).stdout.decode()
    names = re.search(r"/boot/vmlinuz-(\S+)$", listed, re.MULTILINE)
    if names is None:
        raise BenchmarkError(f"{record.name} has no kernel")
    disk = folder / "debian.img"
    export(image, "raw", str(disk), Wishes(boot=False))
    kernel, initrd = (
        _taken(image, f"boot/{name}-{names[1]}", folder) for name in ("vmlinuz", "initrd.img")
    )
    return Debian(image, names[1], kernel, initrd, disk)


def _taken(image: str, path: str, folder: Path) -> Path:
    target = folder / Path(path).name
    with open(target, "wb") as out:
        run(["unsquashfs", "-cat", image, path], stdout=out.fileno())
    return target
