"""A disk that boots by itself: the pot, a base image and changes, for BIOS and UEFI.

A partition table (GPT) with GRUB's core for a BIOS, a FAT system partition with GRUB for UEFI and
the kernel for both, then what a guest mounts: the runtime, the image and the changes as they are.
Which partition is which stands in one more, for the agent.  No root, nothing is mounted; the same
inputs give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import struct
import uuid
from collections.abc import Sequence
from pathlib import Path

from apppot.guest.protocol import drive
from apppot.guest.protocol.job import Job, Layer
from apppot.host.common.errors import ImageError
from apppot.host.common.files import file_digest
from apppot.host.common.frozen import frozen
from apppot.host.common.progress import Progress
from apppot.host.images.changes import record as changes
from apppot.host.images.digests import digest_of
from apppot.host.images.probe import ImageFormat
from apppot.host.images.record import Image
from apppot.host.images.resolve import resolve
from apppot.host.pot import layout
from apppot.host.process import run

SECTOR, MIB = 512, 1 << 20
# Raise it when the same inputs give another disk.
FORMAT = "1"
BIOS, ESP, LINUX = (
    "21686148-6449-6E6F-744E-656564454649",
    "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
)
GRUB_MODULES = "/usr/lib/grub"
# GRUB finds its partition by number on the disk that the firmware booted.
ESP_NUMBER = 2
FOLDER = "apppot"
ESP_SLACK = 40 * MIB  # more than FAT32 must have
# 2025-01-01: the date of all files of ours.
DATE = 1735689600
HINT = "apt-get install grub-pc-bin grub-efi-amd64-bin grub-common mtools dosfstools fdisk"
# Both consoles; the last one that exists is the job's.
WORDS = "ro rootfstype=ext4 rootwait init=/sbin/apppot-init quiet console=tty0 console=ttyS0,115200"


@frozen
class Content:
    """What goes into a partition: bytes of a file, from `offset` on; or nothing."""

    path: str = ""
    offset: int = 0
    size: int = 0


@frozen
class Partition:
    """An entry of the table.  `start` and `sectors` in units of SECTOR."""

    name: str
    kind: str
    id: str
    start: int
    sectors: int
    content: Content


def kernel() -> str:
    """The bzImage that boots on a PC.  Raises PotError."""
    return layout.find_x86_kernel().bzimage


def resolve_changes(paths: Sequence[str], image: Image) -> list[Image]:
    """The changes files, each checked to belong to `image`.  Raises ImageError."""
    found = []
    for path in paths:
        one = resolve(path if "/" in path else f"./{path}")
        record = changes.read(one.path)
        if record is not None:
            name = image.record.name if image.record else image.path
            changes.check_base(path, record, digest_of(image), name)
        found.append(one)
    return found


def write(
    image: Image, over: Sequence[Image], target: str, work: str, scratch: int, progress: Progress
) -> str:
    """Write the disk to the new file `target`, its parts to the folder `work`; returns its id.

    `over` are changes, the lowest first; `scratch` bytes, 0 for none, is a disk space for what
    jobs write.  Raises ImageError, PotError, ToolError.
    """
    tools = {name: tool(name) for name in ("grub-mkimage", "sfdisk", "mkfs.fat", "mmd", "mcopy")}
    pot = layout.find_pot()
    bzimage = kernel()
    kernel_digest = file_digest(bzimage)
    identity = ":".join(
        [
            FORMAT,
            kernel_digest,
            pot.runtime_digest,
            *map(digest_of, [image, *over]),
            str(scratch),
        ]
    )
    layers = {"apppot-base": image}
    layers.update({f"apppot-changes{number}": one for number, one in enumerate(over)})
    description = os.path.join(work, "disk.tar")
    Path(description).write_bytes(drive.pack(_describe(image, layers, scratch), drive.DISK_MEMBER))
    root = _id(identity, "apppot-runtime")
    core = _core(tools, work)
    esp = _esp(tools, work, bzimage, root)
    contents = [
        ("apppot-bios", BIOS, Content()),
        ("apppot-esp", ESP, _whole(esp)),
        ("apppot-disk", LINUX, _whole(description)),
        ("apppot-runtime", LINUX, _whole(pot.runtime)),
        *((name, LINUX, _content(one)) for name, one in layers.items()),
    ]
    if scratch:
        contents.append(("apppot-scratch", LINUX, Content(size=scratch)))
    table = place(contents, identity)
    _write_table(tools["sfdisk"], target, table, _id(identity, "disk"))
    _embed(target, core, table[0])
    _fill(target, table, progress)
    return _id(identity, "disk")


def tool(name: str) -> str:
    """The path of a host's tool, which may lie where only root looks.  Raises ImageError."""
    places = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
    names = (name, name.replace("grub-", "grub2-"))
    found = next((path for path in (shutil.which(one, path=places) for one in names) if path), None)
    if found is None:
        raise ImageError(f"{name}, which a bootable disk needs, is missing", HINT)
    return found


def _id(identity: str, name: str) -> str:
    """A GUID that is the same for the same inputs."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"apppot\0{identity}\0{name}"))


def _describe(image: Image, layers: dict[str, Image], scratch: int) -> bytes:
    """What the agent reads of its disk; the sources are names of partitions."""
    record = image.record
    env = {} if record is None else record.env
    return Job(
        layers=[
            Layer(source=name.encode(), fstype=one.format.file_system)
            for name, one in layers.items()
        ],
        env={os.fsencode(name): os.fsencode(value) for name, value in env.items()},
        scratch=b"apppot-scratch" if scratch else None,
    ).dump()


def _whole(path: str) -> Content:
    return Content(path, 0, os.stat(path).st_size)


def _content(image: Image) -> Content:
    """The file system in an image's file."""
    probed = image.probed
    if image.format is ImageFormat.COW:
        raise ImageError(
            f"{image.path} is a COW file, not an image", "apppot image import it first"
        )
    size = probed.length or probed.size - probed.offset
    return Content(image.path, probed.offset, size)


def place(contents: Sequence[tuple[str, str, Content]], identity: str) -> list[Partition]:
    """The partitions, each on a whole MiB, in the order given."""
    table, at = [], MIB // SECTOR
    for name, kind, content in contents:
        sectors = max(1, -(-content.size // MIB)) * MIB // SECTOR
        table.append(Partition(name, kind, _id(identity, name), at, sectors, content))
        at += sectors
    return table


# --- boot loaders --------------------------------------------------------------------------------


def _mkimage(tools: dict[str, str], platform: str, target: str, prefix: str, modules: str) -> None:
    folder = f"{GRUB_MODULES}/{platform}"
    if not os.path.isdir(folder):
        raise ImageError(f"GRUB's modules in {folder} are missing", HINT)
    argv = [tools["grub-mkimage"], "-O", platform, "-d", folder, "-o", target, "-p", prefix]
    run.run([*argv, *modules.split()])


def _core(tools: dict[str, str], work: str) -> bytes:
    target = os.path.join(work, "core.img")
    prefix = f"(,gpt{ESP_NUMBER})/{FOLDER}"
    _mkimage(tools, "i386-pc", target, prefix, "biosdisk part_gpt fat normal linux boot")
    return Path(target).read_bytes()


def _embed(disk: str, core: bytes, bios: Partition) -> None:
    """Put GRUB where a BIOS finds it: its first sector, and the core in a partition of its own.

    As grub-bios-setup does it: the first sector is told where the core begins (bytes 92 to 99)
    and to take the BIOS's word for the drive's number (102, 103); the core's first sector where
    its rest is (bytes 500 to 507).
    """
    boot = bytearray(Path(f"{GRUB_MODULES}/i386-pc/boot.img").read_bytes()[:440])
    boot[92:100] = struct.pack("<Q", bios.start)
    boot[102:104] = b"\x90\x90"
    if len(core) > bios.sectors * SECTOR:
        raise ImageError(f"GRUB's core of {len(core)} bytes does not fit into its partition")
    core = core[:500] + struct.pack("<Q", bios.start + 1) + core[508:]
    with open(disk, "r+b") as file:
        file.write(boot)
        file.seek(bios.start * SECTOR)
        file.write(core)


def _esp(tools: dict[str, str], work: str, bzimage: str, root: str) -> str:
    """The EFI system partition, a FAT file system: GRUB, the kernel, and its command line."""
    staged = Path(work) / "esp"
    (staged / "EFI" / "BOOT").mkdir(parents=True)
    (staged / FOLDER).mkdir()
    loader = staged / "EFI" / "BOOT" / "BOOTX64.EFI"
    modules = "part_gpt fat normal linux boot efi_gop"
    _mkimage(tools, "x86_64-efi", str(loader), f"/{FOLDER}", modules)
    shutil.copyfile(bzimage, staged / FOLDER / "linux")
    words = f"root=PARTUUID={root} {WORDS} apppot.disk"
    (staged / FOLDER / "grub.cfg").write_text(f"linux /{FOLDER}/linux {words}\nboot\n")
    target = os.path.join(work, "esp.fat")
    with open(target, "xb") as file:
        file.truncate(-(-os.stat(bzimage).st_size // MIB) * MIB + ESP_SLACK)
    env = {"PATH": os.defpath, "TZ": "UTC", "SOURCE_DATE_EPOCH": str(DATE), "MTOOLSRC": os.devnull}
    argv = [tools["mkfs.fat"], "-F", "32", "-s", "1", "-n", "APPPOT-ESP"]
    run.run([*argv, "--invariant", target], env=env)
    for folder in ("EFI", "EFI/BOOT", FOLDER):
        run.run([tools["mmd"], "-i", target, f"::{folder}"], env=env)
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        os.utime(path, (DATE, DATE))
        name = f"::{path.relative_to(staged)}"
        run.run([tools["mcopy"], "-m", "-i", target, path, name], env=env)
    return target


# --- the disk ------------------------------------------------------------------------------------


def _write_table(sfdisk: str, target: str, table: Sequence[Partition], disk_id: str) -> None:
    last = table[-1].start + table[-1].sectors
    with open(target, "xb") as file:
        file.truncate(last * SECTOR + MIB)  # the table's copy is at the end
    lines = ["label: gpt", f"label-id: {disk_id}", "unit: sectors", "first-lba: 2048"]
    for part in table:
        lines.append(
            f"start={part.start}, size={part.sectors}, type={part.kind}, "
            f'uuid={part.id}, name="{part.name}"'
        )
    argv = [sfdisk, "--quiet", "--no-reread", "--no-tell-kernel", target]
    run.run(argv, stdin="\n".join([*lines, ""]).encode(), env={"LC_ALL": "C.UTF-8"})


def _fill(target: str, table: Sequence[Partition], progress: Progress) -> None:
    """Copy the contents; what is zero stays a hole."""
    progress.total = sum(part.content.size for part in table if part.content.path)
    done, zeros = 0, bytes(MIB)
    with open(target, "r+b") as disk:
        for part in table:
            if not part.content.path:
                continue
            left = part.content.size
            disk.seek(part.start * SECTOR)
            with open(part.content.path, "rb") as source:
                source.seek(part.content.offset)
                while left:
                    piece = source.read(min(MIB, left))
                    if not piece:
                        raise ImageError(f"{part.content.path} ends {left} bytes too early")
                    if piece == zeros[: len(piece)]:
                        disk.seek(len(piece), os.SEEK_CUR)
                    else:
                        disk.write(piece)
                    left -= len(piece)
                    done += len(piece)
                    progress.update(done, part.name)
        disk.flush()
        os.fsync(disk.fileno())
