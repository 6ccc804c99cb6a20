"""What a kernel file says of itself.  Runs it where it is a program; `layout` keeps the answer."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
from typing import BinaryIO

from apppot.host.common.errors import PotError
from apppot.host.process.run import ToolError, run

# Options in `linux --help` that the launcher cares for.
HELP_WORDS = re.compile(rb"^(seccomp|ncpus)=", re.MULTILINE)
# A boot option of the kernel proper, which --help does not list: the string is in the binary.
BINARY_WORDS = (b"anon_around",)
# A line of the loader's list: "libc.so.6 => /lib/libc.so.6 (0x…)" or "/lib/ld.so (0x…)".
LIBRARY = re.compile(r"^\s*(?:\S+ => )?(/.*) \(0x[0-9a-f]+\)$", re.MULTILINE)
ELF_HEAD = 64
PT_INTERP = 3
PT_NOTE = 4
# Notes of the name "Xen" in a vmlinux, by which a hypervisor finds how to start it.
XEN_NOTES = {1: "xen", 18: "pvh"}
VERSION = re.compile(rb"Linux version (\d+\.\d+\S*) ")


def probe_kernel(path: str) -> dict[str, object]:
    """Release, digest (hex sha256) and features of a User-Mode Linux kernel file.

    Raises PotError where it is not one.
    """
    hint = "give the path of a User-Mode Linux kernel for this processor"
    try:
        # --version prints the release and --help the options; neither boots.
        release = run([path, "--version"], timeout=20).stdout.decode(errors="replace").strip()
        help_text = run([path, "--help"], check=False, timeout=20)
    except ToolError as error:
        raise PotError(f"{path} does not run as a kernel: {error.cause}", hint) from error
    if not re.fullmatch(r"\d+\.\d+\S*", release):
        raise PotError(f"{path} is not a User-Mode Linux kernel", hint)
    features = set(HELP_WORDS.findall(help_text.stdout + help_text.stderr))
    digest, inside = _scan(path)
    words = sorted(word.decode() for word in features | inside)
    libraries = shared_libraries(path)
    return {"release": release, "digest": digest, "features": words, "libraries": libraries}


def shared_libraries(path: str) -> list[str]:
    """The loader and libraries of a dynamically linked program, as it opens them; none if static.

    Raises PotError where its own loader cannot find them.
    """
    loader = _loader(path)
    if loader is None:
        return []
    try:
        listed = run([loader, "--list", os.path.abspath(path)], timeout=20).stdout
    except ToolError as error:
        hint = "build the pot's kernel, which is linked statically: `apppot pot build`"
        raise PotError(f"{path} lacks libraries: {error.cause}", hint) from error
    found = LIBRARY.findall(os.fsdecode(listed))
    return sorted({loader, *found})


def _loader(path: str) -> str | None:
    """The program interpreter in a 64-bit ELF file's header; None where there is none."""
    with open(path, "rb") as file:
        names = _segments(file, PT_INTERP)
    return os.fsdecode(names[0].rstrip(b"\0")) if names else None


def _segments(file: BinaryIO, wanted: int) -> list[bytes]:
    """Contents of the segments of one type in a 64-bit ELF file; none where it is no such file."""
    head = file.read(ELF_HEAD)
    if head[:5] != b"\x7fELF\x02":
        return []
    (table,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    found = []
    for number in range(count):
        file.seek(table + number * size)
        kind, _, start, _, _, length = struct.unpack("<IIQQQQ", file.read(40))
        if kind == wanted:
            file.seek(start)
            found.append(file.read(length))
    return found


def probe_vmlinux(path: str) -> dict[str, object]:
    """Release, digest (hex sha256) and features ("pvh", "xen") of an x86-64 vmlinux.

    Raises PotError where it is not one.
    """
    with open(path, "rb") as file:
        notes = b"".join(_segments(file, PT_NOTE))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            versions = [match[1].decode() for match in VERSION.finditer(data)]
            digest = hashlib.sha256(data).hexdigest()
    if not versions:
        raise PotError(f"{path} is not a Linux kernel")
    types = xen_notes(notes)
    features = sorted(word for kind, word in XEN_NOTES.items() if kind in types)
    return {"release": versions[0], "digest": digest, "features": features}


def xen_notes(data: bytes) -> set[int]:
    """Types of the notes named "Xen" in the contents of a note segment."""
    found, offset = set(), 0
    while offset + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, offset)
        name = data[offset + 12 : offset + 12 + name_size]
        if name == b"Xen\0":
            found.add(kind)
        offset += 12 + (name_size + 3 & ~3) + (size + 3 & ~3)
    return found


def _scan(path: str) -> tuple[str, set[bytes]]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        digest = hashlib.sha256(data).hexdigest()
        return digest, {word for word in BINARY_WORDS if data.find(word + b"=\0") >= 0}
