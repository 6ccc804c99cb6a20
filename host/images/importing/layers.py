"""The tree that layers of tar members make, one applied over the other.  Pure: no file is touched.

Members are applied as a container engine does inside the image's own root: the last one wins,
directories of a symbolic link's name are followed within that root, whiteouts (`.wh.NAME`,
`.wh..wh..opq`) hide what lower layers have.  What leaves the root, or cannot be done, is an
error.  Contents stay where they are: a file remembers which member of which layer holds them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping

from apppot.host.common.errors import ImageError
from apppot.host.common.frozen import frozen
from apppot.host.common.text import printable

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
AUFS = ".wh..wh."  # the old union file system's own book-keeping
XATTR = ("SCHILY.xattr.", "LIBARCHIVE.xattr.")
ACCESS_LIST = ("SCHILY.acl.", *(f"{prefix}system.posix_acl_" for prefix in XATTR))
MAX_LINKS = 40
MAX_DEPTH = 1000
MAX_NAME = 255  # bytes
MAX_MEMBERS = 4_000_000  # about half a kilobyte of memory each
MAX_CONTENT = 1 << 38  # bytes in all files of an image, holes included
MAX_UINT32 = 0xFFFFFFFF
HINT = "is it an archive of a whole, sound file system?"

DIRECTORY, FILE, SYMLINK = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE
_SPECIAL = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_SKIPPED = (b"V",)  # a volume's label
_DUMP_DIRECTORY = b"D"


class Node:
    """A file, directory or other thing: its attributes, and where its contents lie.

    Two names of one node are hard links.  `layer` is the last one that spoke of it, `place`
    (layer, number of the member) of a regular file's contents.
    """

    __slots__ = (
        *("kind", "mode", "uid", "gid", "mtime", "size", "target", "device", "xattrs"),
        *("layer", "place", "children", "path"),
    )

    def __init__(self, kind: bytes, layer: int) -> None:
        self.kind, self.layer = kind, layer
        self.mode = 0o755
        self.uid = self.gid = self.mtime = self.size = 0
        self.target = ""
        self.device = (0, 0)
        self.xattrs: dict[str, str] | None = None
        self.place: tuple[int, int] | None = None
        self.children: dict[str, Node] | None = {} if kind == DIRECTORY else None
        self.path = ""  # the first name in the finished tree


@frozen
class LayerEntry:
    """One name of the finished tree; `link` is the name that it is a further hard link of."""

    path: str
    node: Node
    link: str | None = None


class Tree:
    """The file system after the layers so far."""

    def __init__(self) -> None:
        self.root = Node(DIRECTORY, -1)
        self.layer = -1
        self.whiteouts = False
        self.access_lists = 0  # members whose list squashfs has no place for
        self._members = 0
        self._content = 0
        self._number = 0

    def start_layer(self, *, whiteouts: bool) -> None:
        """What is added from now on lies over what there is."""
        self.layer += 1
        self.whiteouts = whiteouts
        self._number = 0

    def add(self, member: tarfile.TarInfo) -> None:
        """Apply the next member of the current layer.  Raises ImageError."""
        number, self._number = self._number, self._number + 1
        self._members += 1
        self.access_lists += any(key.startswith(ACCESS_LIST) for key in member.pax_headers)
        if self._members > MAX_MEMBERS:
            raise ImageError(f"more than {MAX_MEMBERS} members", "split the image")
        if member.type in _SKIPPED:
            return
        parts = split(member.name)
        if not parts:
            self._root(member)
            return
        *above, name = parts
        if self.whiteouts and name.startswith(WHITEOUT):
            self._whiteout(above, name, member.name)
            return
        parent = self._directory(above, member.name)
        node = self._node(member, number)
        assert parent.children is not None
        there = parent.children.get(name)
        if there is not None and there.kind == DIRECTORY and node.kind == DIRECTORY:
            node.children = there.children  # the same directory with other attributes
        parent.children[name] = node

    def _root(self, member: tarfile.TarInfo) -> None:
        if member.type not in (DIRECTORY, _DUMP_DIRECTORY):
            raise ImageError("the root is no directory", HINT)
        _attributes(self.root, member)

    def _node(self, member: tarfile.TarInfo, number: int) -> Node:
        kind = DIRECTORY if member.type == _DUMP_DIRECTORY else member.type
        if kind == tarfile.LNKTYPE:
            return self._linked(member)
        if member.isreg():
            kind = FILE
        elif kind not in (DIRECTORY, SYMLINK, *_SPECIAL):
            raise ImageError(f"{shown(member.name)} is a member of unknown kind {kind!r}", HINT)
        node = Node(kind, self.layer)
        _attributes(node, member)
        if kind == FILE:
            self._content += member.size
            if self._content > MAX_CONTENT:
                raise ImageError(f"its files have more than {MAX_CONTENT >> 30} GiB", HINT)
            node.size, node.place = member.size, (self.layer, number)
        elif kind == SYMLINK:
            if not member.linkname or "\0" in member.linkname:
                raise ImageError(f"the symbolic link {shown(member.name)} leads nowhere", HINT)
            node.target = member.linkname
        elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            node.device = (member.devmajor, member.devminor)
            if not (0 <= member.devmajor < 1 << 12 and 0 <= member.devminor < 1 << 20):
                raise ImageError(f"the device {shown(member.name)} has impossible numbers", HINT)
        return node

    def _linked(self, member: tarfile.TarInfo) -> Node:
        *above, name = split(member.linkname) or [""]
        parent = self._directory(above, member.name, make=False)
        assert parent.children is not None
        node = parent.children.get(name)
        if node is None or node.kind == DIRECTORY:
            what = "is a directory" if node else "is not there"
            raise ImageError(
                f"the hard link {shown(member.name)} is to {shown(member.linkname)}, which {what}",
                HINT,
            )
        node.layer = self.layer
        return node

    def _directory(self, parts: list[str], why: str, *, make: bool = True) -> Node:
        """The directory at `parts`, through symbolic links; missing ones are made."""
        trail, todo, links = [self.root], list(reversed(parts)), 0
        while todo:
            name = todo.pop()
            if name == "..":
                trail = trail[:-1] or [self.root]
                continue
            here = trail[-1].children
            assert here is not None
            node = here.get(name)
            if node is None:
                if not make:
                    needed = shown("/".join(parts))
                    raise ImageError(f"{shown(why)} needs {needed}, which is not there", HINT)
                node = here[name] = Node(DIRECTORY, self.layer)
            if node.kind == SYMLINK:
                links += 1
                if links > MAX_LINKS:
                    raise ImageError(f"{shown(why)}: symbolic links go round in circles", HINT)
                if node.target.startswith("/"):
                    trail = [self.root]
                todo += reversed(_words(node.target))
            elif node.kind == DIRECTORY:
                trail.append(node)
            else:
                raise ImageError(f"{shown(why)} lies below a file that is no directory", HINT)
        return trail[-1]

    def _whiteout(self, above: list[str], name: str, why: str) -> None:
        parent = self._directory(above, why)
        assert parent.children is not None
        if name == OPAQUE:
            self._drop_lower(parent)
            return
        if name.startswith(AUFS):
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in ("", ".", ".."):
            raise ImageError(f"{shown(why)} is no whiteout of a name", HINT)
        node = parent.children.get(hidden)
        if node is None:
            return
        if node.kind == DIRECTORY and self._drop_lower(node):
            return
        if node.layer != self.layer:
            del parent.children[hidden]

    def _drop_lower(self, node: Node) -> bool:
        """Remove what lower layers have below `node`; whether anything of this one is left."""
        assert node.children is not None
        for name, child in list(node.children.items()):
            kept = child.kind == DIRECTORY and self._drop_lower(child)
            if not kept and child.layer != self.layer:
                del node.children[name]
        return bool(node.children)

    def make_directory(self, path: str) -> None:
        """See that there is a directory at `path`, as a working directory needs it."""
        self._directory(split(path), path)

    def entries(self) -> Iterator[LayerEntry]:
        """All names, sorted, directories before what is in them; the root (path "") first."""
        yield LayerEntry("", self.root)
        stack = [("", self.root)]
        while stack:
            path, node = stack.pop()
            below = []
            assert node.children is not None
            for name in sorted(node.children):
                child = node.children[name]
                place = f"{path}/{name}" if path else name
                if child.kind == DIRECTORY:
                    below.append((place, child))
                    yield LayerEntry(place, child)
                elif child.path:
                    yield LayerEntry(place, child, child.path)
                else:
                    child.path = place
                    yield LayerEntry(place, child)
            stack += reversed(below)


def split(name: str) -> list[str]:
    """The parts of a member's name within the image.  Raises ImageError for one that leaves it."""
    parts = _words(name)
    if ".." in parts:
        raise ImageError(f"member {shown(name)} leaves the image", "this archive may be an attack")
    longest = max((len(part.encode("utf-8", "surrogateescape")) for part in parts), default=0)
    if len(parts) > MAX_DEPTH or longest > MAX_NAME:
        raise ImageError(f"member {shown(name)} has a name that no file system takes", HINT)
    return parts


def _words(path: str) -> list[str]:
    if "\0" in path:
        raise ImageError(f"{shown(path)} is no file name", HINT)
    return [word for word in path.split("/") if word not in ("", ".")]


def shown(name: str) -> str:
    """A stranger's name for a message: no control characters, of bounded length."""
    return repr(printable(name))


def _attributes(node: Node, member: tarfile.TarInfo) -> None:
    node.mode = member.mode & 0o7777
    node.uid, node.gid = _id(member.uid, member), _id(member.gid, member)
    node.mtime = int(max(0, min(member.mtime, MAX_UINT32)))
    node.xattrs = _xattrs(member.pax_headers) or None


def _id(number: int, member: tarfile.TarInfo) -> int:
    if not 0 <= number < MAX_UINT32:
        raise ImageError(f"{shown(member.name)} has the impossible owner {number}", HINT)
    return number


def _xattrs(headers: Mapping[str, str]) -> dict[str, str]:
    """Extended attributes as SCHILY records, which both tar and sqfstar know."""
    found = {}
    for key, value in headers.items():
        if key.startswith(XATTR[0]):
            found[key] = value
        elif key.startswith(XATTR[1]):
            found.setdefault(XATTR[0] + key[len(XATTR[1]) :], _from_libarchive(value))
    # squashfs has no place for the others (POSIX ACLs are system.*).
    kept = tuple(f"{XATTR[0]}{space}." for space in ("user", "trusted", "security"))
    return {key: value for key, value in sorted(found.items()) if key.startswith(kept)}


def _from_libarchive(value: str) -> str:
    import base64
    import binascii

    try:
        raw = base64.b64decode(value + "=" * (-len(value) % 4))
    except (binascii.Error, ValueError):
        raise ImageError("an extended attribute is damaged", HINT) from None
    return raw.decode("utf-8", "surrogateescape")
