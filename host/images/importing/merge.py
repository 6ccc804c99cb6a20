"""Tar layers into one squashfs: nothing is unpacked to disk, nothing needs root.

Every layer is read twice.  The first time its headers build the tree and its digests are
checked; then the contents that are still visible go to the packer, in the order in which the
layers have them.  So what a lower layer has and an upper one hides is never written, and a hard
link keeps its contents although the name that carried them is gone.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable, Sequence

from apppot.host.common.errors import ImageError
from apppot.host.common.files import write_all
from apppot.host.common.progress import Progress
from apppot.host.common.text import printable
from apppot.host.images import pack
from apppot.host.images.importing import tarstream
from apppot.host.images.importing.layers import DIRECTORY, FILE, SYMLINK, LayerEntry, Node, Tree
from apppot.host.images.importing.tarstream import Blob
from apppot.host.process import run

ZEROS = bytes(1 << 16)
BLOCK = tarfile.BLOCKSIZE


def merge(
    blobs: Sequence[Blob],
    image: str,
    title: str,
    *,
    whiteouts: bool,
    directories: Sequence[str] = (),
    edit: Callable[[Tree], None] | None = None,
    epoch: int | None = None,
) -> None:
    """Write the layers `blobs` (lowest first) to the squashfs `image`.

    `directories` are made where no layer has them; `edit` may change the tree before it is
    written.  With `epoch` (seconds) no file's time is later.  Raises ImageError for what is
    damaged, truncated, or does not fit together.
    """
    with Progress(title, 2 * sum(blob.size for blob in blobs)) as progress:
        tree = _plan(blobs, progress, whiteouts=whiteouts)
        for path in directories:
            tree.make_directory(path)
        if edit is not None:
            edit(tree)
        try:
            with pack.Packer(image, epoch or 0, clamp=epoch is not None) as packer:
                _write(tree, blobs, packer, progress)
        except run.ToolError as error:
            cause = printable(" ".join(error.cause.split()))
            raise ImageError(f"{title}: {cause}", error.hint or "apppot doctor") from None
    if tree.access_lists:
        sys.stderr.write(
            f"apppot: the access control lists of {tree.access_lists} files are not kept: squashfs "
            "has no place for them\n  remedy: set them in a session, `apppot image commit` it\n"
        )


def _count(progress: Progress) -> Callable[[int], None]:
    return lambda size: progress.update(progress.done + size)


def _plan(blobs: Sequence[Blob], progress: Progress, *, whiteouts: bool) -> Tree:
    tree = Tree()
    for blob in blobs:
        tree.start_layer(whiteouts=whiteouts)
        with tarstream.opened(blob, _count(progress)) as stream:
            for member in tarstream.members(stream, blob.name):
                try:
                    tree.add(member)
                except ImageError as error:
                    raise ImageError(f"{blob.name}: {error.cause}", error.hint) from None
    return tree


def _write(tree: Tree, blobs: Sequence[Blob], packer: pack.Packer, progress: Progress) -> None:
    """Directories and all without contents, then contents, then the further names."""
    wanted: dict[tuple[int, int], LayerEntry] = {}
    links: list[LayerEntry] = []
    send = _Sender(packer)
    for entry in tree.entries():
        if entry.link is not None:
            links.append(entry)
        elif entry.node.kind == FILE:
            assert entry.node.place is not None
            wanted[entry.node.place] = entry
        else:
            send.header(entry)
    for number, blob in enumerate(blobs):
        _contents(number, blob, wanted, send, progress)
    for entry in links:
        send.header(entry)
    send.bytes(tarstream.END_OF_TAR)
    send.flush()


def _contents(
    number: int,
    blob: Blob,
    wanted: dict[tuple[int, int], LayerEntry],
    send: _Sender,
    progress: Progress,
) -> None:
    if not any(layer == number for layer, _ in wanted):
        progress.update(progress.done + blob.size)
        return
    with tarstream.opened(blob, _count(progress)) as stream:
        for index, member in enumerate(tarstream.members(stream, blob.name)):
            entry = wanted.get((number, index))
            if entry is not None:
                send.header(entry)
                _data(stream, member, send)


def _data(stream: tarstream.Stream, member: tarfile.TarInfo, send: _Sender) -> None:
    """A file's contents, with the holes of a sparse one filled in: squashfs finds them again."""
    pieces = getattr(member, "sparse", None)
    if pieces is None:
        pieces = [(0, member.size)]
    done = 0
    for start, length in pieces:
        if not length:
            continue  # GNU tar fills its table with those
        if start < done or start + length > member.size:
            raise ImageError(f"the sparse member {member.name!r} is damaged")
        send.zeros(start - done)
        stream.copy(length, send.bytes)
        done = start + length
    send.zeros(member.size - done)
    send.zeros(-member.size % BLOCK)


class _Sender:
    """Writes tar members into the packer's pipe, small ones together."""

    def __init__(self, packer: pack.Packer) -> None:
        self._writer = packer.writer
        self._parts: list[bytes] = []
        self._size = 0

    def header(self, entry: LayerEntry) -> None:
        self.bytes(header(entry))

    def bytes(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        if self._size >= tarstream.CHUNK:
            self.flush()

    def zeros(self, count: int) -> None:
        while count > 0:
            piece = ZEROS[: min(count, len(ZEROS))]
            self.bytes(piece)
            count -= len(piece)

    def flush(self) -> None:
        write_all(self._writer, b"".join(self._parts))
        self._parts.clear()
        self._size = 0


def header(entry: LayerEntry) -> bytes:
    """The tar header of one name, with extended headers where ustar has no room."""
    node = entry.node
    info = tarfile.TarInfo(entry.path or ".")
    info.mode, info.uid, info.gid, info.mtime = node.mode, node.uid, node.gid, node.mtime
    if entry.link is not None:
        info.type, info.linkname = tarfile.LNKTYPE, entry.link
        return _encoded(info)
    info.type = node.kind
    _special(info, node)
    info.pax_headers = node.xattrs or {}
    return _encoded(info)


def _special(info: tarfile.TarInfo, node: Node) -> None:
    if node.kind == FILE:
        info.size = node.size
    elif node.kind == SYMLINK:
        info.linkname = node.target
    elif node.kind != DIRECTORY:
        info.devmajor, info.devminor = node.device


def _encoded(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
