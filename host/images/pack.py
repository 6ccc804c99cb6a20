"""A tar stream into a squashfs image: without root, without unpacking, the same bytes each time."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO

from apppot.host.common.errors import ApppotError, BuildError
from apppot.host.common.files import write_all
from apppot.host.common.text import printable
from apppot.host.process import run

# -noI leaves inodes and directories uncompressed: a guest looks files up faster, it costs about
# one percent, and the root's time can be set (see `_set_root_time`).
SQFSTAR = (
    *("sqfstar", "-comp", "zstd", "-noI", "-quiet", "-no-progress", "-exit-on-error"),
    *("-reproducible", "-root-mode", "755"),
)
INSTALL_HINT = "apt-get install squashfs-tools"
TIMEOUT = 6 * 3600.0
DIRECTORY_TYPES = (1, 8)  # basic and extended directory inodes
UNCOMPRESSED = 0x8000


class Packer:
    """sqfstar reading a tar from one end of a pipe while the caller writes the other.

    As a context manager: leaving it normally closes the pipe, waits and raises what sqfstar
    had to say (ToolError); leaving it by an exception abandons the half-made file.
    `epoch` (seconds) is the file system's creation time and its root directory's time; with
    `clamp`, no file's time is later.
    """

    def __init__(self, target: str, epoch: int, *, clamp: bool) -> None:
        self.target = target
        self.epoch = epoch
        self._clamp = clamp
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._pack, daemon=True)

    def __enter__(self) -> Packer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.writer)
        self._thread.join()
        # A tool that died is the cause of the caller's EPIPE, not the other way round.
        if self._failure is not None and (kind is None or issubclass(kind, BrokenPipeError)):
            raise self._failure
        if kind is None:
            _mend_root(self.target, self.epoch)

    @property
    def failed(self) -> bool:
        """Whether sqfstar has ended with an error."""
        return self._failure is not None

    def _pack(self) -> None:
        argv: list[str] = [*SQFSTAR]
        env = {key: value for key, value in os.environ.items() if key != "SOURCE_DATE_EPOCH"}
        if self._clamp:
            env["SOURCE_DATE_EPOCH"] = str(self.epoch)
        else:
            argv += ["-mkfs-time", str(self.epoch)]
        try:
            run.run(
                [*_as_root(), *argv, self.target],
                stdin=self._reader,
                env=env,
                timeout=TIMEOUT,
                hint=INSTALL_HINT,
            )
        except BaseException as error:
            self._failure = error
        finally:
            # Whoever still writes gets EPIPE instead of waiting for a reader for ever.
            os.close(self._reader)


def stream(descriptor: int, read: Callable[[int], bytes], chunk: int = 1 << 20) -> None:
    """Write everything that `read` gives into a pipe."""
    while data := read(chunk):
        write_all(descriptor, data)


def _as_root() -> tuple[str, ...]:
    """A prefix under which sqfstar takes itself for root, where this host allows one.

    sqfstar 4.5 gives the root directory to its caller and so puts the caller's id into the
    image; in a user namespace, everybody's image has the same bytes.
    """
    prefix = ("unshare", "--map-root-user")
    if os.geteuid() == 0 or run.run([*prefix, "true"], check=False, timeout=30).returncode:
        return ()
    return prefix


def _mend_root(path: str, epoch: int) -> None:
    """Give the root directory to root and a fixed time; sqfstar 4.5 ignores its own options."""
    with open(path, "r+b") as image:
        superblock = image.read(96)
        if superblock[:4] != b"hsqs":
            raise BuildError(f"{path} is not squashfs after packing")
        (root,) = struct.unpack_from("<Q", superblock, 32)
        (table,) = struct.unpack_from("<Q", superblock, 64)
        block = table + (root >> 16)
        image.seek(block)
        (header,) = struct.unpack("<H", image.read(2))
        place = block + 2 + (root & 0xFFFF)
        image.seek(place)
        kind, _, uid, gid = struct.unpack("<HHHH", image.read(8))
        if not header & UNCOMPRESSED or kind not in DIRECTORY_TYPES:
            raise BuildError("sqfstar wrote a root directory of an unexpected form", INSTALL_HINT)
        zero = _index_of_zero(image, superblock)
        image.seek(place + 4)
        owner = (uid, gid) if zero is None else (zero, zero)
        image.write(struct.pack("<HHI", *owner, epoch))


def _index_of_zero(image: BinaryIO, superblock: bytes) -> int | None:
    """Where id 0 stands in the first block of the image's table of ids."""
    (count,) = struct.unpack_from("<H", superblock, 26)
    (pointers,) = struct.unpack_from("<Q", superblock, 48)
    image.seek(pointers)
    (block,) = struct.unpack("<Q", image.read(8))
    image.seek(block)
    (header,) = struct.unpack("<H", image.read(2))
    if not header & UNCOMPRESSED:
        return None
    size = min(header & ~UNCOMPRESSED, 4 * count)
    ids = struct.unpack(f"<{size // 4}I", image.read(size))
    return ids.index(0) if 0 in ids else None


def distribution(path: str) -> str:
    """PRETTY_NAME of a squashfs image's os-release; "" where there is none or no unsquashfs."""
    for name in ("usr/lib/os-release", "etc/os-release"):
        try:
            done = run.run(["unsquashfs", "-cat", path, name], check=False, timeout=60)
        except ApppotError:
            return ""
        for line in done.stdout.decode(errors="replace").splitlines():
            key, _, value = line.partition("=")
            if key == "PRETTY_NAME":
                return printable(value.strip("\"'"))
    return ""
