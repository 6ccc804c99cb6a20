"""Write a repository: a static folder that any web server can serve.

    index.json                 what there is; a copy of the current indexes/xx/<sha256>
    index.json.sig             names the current index by digest and signs it: the commit point
    index.html                 the same for people
    indexes/xx/<sha256>        every index since the last `--prune`
    maps/xx/<sha256>           per image: the list of its chunks, zstd-compressed JSON
    packs/xx/<sha256>          chunks, one after the other, up to 32 MiB

All but the first three are named by their content and never change.  A publish adds files, makes
them durable, and then replaces `index.json.sig` in one rename: whoever reads meanwhile, and
whoever reads after a kill -9 at any moment, finds a whole repository, the old one or the new one.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from apppot.host.common.errors import ApppotError, ImageError, RepositoryError, UsageError
from apppot.host.common.files import PARTIAL, file_digest, sync, write_atomic
from apppot.host.common.frozen import frozen
from apppot.host.common.progress import Progress
from apppot.host.common.text import printable
from apppot.host.common.units import timestamp
from apppot.host.images import store
from apppot.host.images.changes import record as changes
from apppot.host.images.importing import importer
from apppot.host.images.probe import ImageFormat, probe
from apppot.host.images.record import (
    LATEST,
    Record,
    check_name,
    is_digest,
    split_reference,
    valid_name,
)
from apppot.host.images.resolve import resolve
from apppot.host.repository import chunks, files, keys, page
from apppot.host.repository.model import (
    FORMATS,
    INDEX,
    SIGNATURE,
    Blob,
    Chunk,
    ChunkMap,
    Index,
    IndexEntry,
    Kind,
    blob_path,
    decode_index,
    decode_map,
    digest_of,
)

PACK_BYTES = 32 << 20
FOLDERS = ("indexes", "maps", "packs")
LOCK = ".lock"


@frozen
class Publication:
    """What a publish is asked to do.  `images` are references into the store, `changes` are
    [NAME[:VERSION]=]FILE, `remove` are NAME[:VERSION]; `description` replaces the images' own."""

    images: Sequence[str] = ()
    changes: Sequence[str] = ()
    remove: Sequence[str] = ()
    description: str = ""
    prune: bool = False


@frozen
class Published:
    """What a publish did: the serial now current, entries in all and new, bytes written to
    packs, and files that `--prune` removed."""

    serial: int
    entries: int
    added: int
    written: int
    pruned: int


def publish(folder: str, wish: Publication, key_names: Sequence[str]) -> Published:
    """Bring the repository in `folder` up to date, made if missing.

    Raises RepositoryError, ImageError; then the repository is as it was.
    """
    for name in key_names:
        keys.load(name)  # before any work
    try:
        os.makedirs(folder, exist_ok=True)
        notice = f"waiting for another publish into {folder}"
        with files.locked(os.path.join(folder, LOCK), notice):
            return _publish(folder, wish, key_names)
    except OSError as error:
        raise RepositoryError(
            f"publishing into {folder} failed: {error.strerror or error}",
            "the repository is as it was; mend the cause and publish again",
        ) from None


def _publish(folder: str, wish: Publication, key_names: Sequence[str]) -> Published:
    _sweep(folder)
    old = read_published(folder)
    index = old or Index(secrets.token_hex(16), 0, "", ())
    serial = index.serial + 1
    writer = Writer(folder)
    new = [_image_entry(reference, wish, writer) for reference in wish.images]
    new += [_changes_entry(text, wish, writer) for text in wish.changes]
    entries = _merged(index.entries, new, wish.remove, serial)
    changed = old is None or entries != index.entries or not _signed_by(folder, key_names)
    if changed:
        index = Index(index.id, serial, timestamp(), entries)
        _commit(folder, index, key_names)
    _write_page(folder, index, key_names)
    pruned = _prune(folder, index) if wish.prune else 0
    return Published(index.serial, len(entries), len(new), writer.written, pruned)


def _merged(
    old: Iterable[IndexEntry], new: Iterable[IndexEntry], remove: Sequence[str], serial: int
) -> tuple[IndexEntry, ...]:
    """The new list of entries; what did not change keeps the serial of its first appearance."""
    entries = {(entry.name, entry.version): entry for entry in old}
    for reference in remove:
        name, _, version = reference.partition(":")
        gone = [key for key in entries if key[0] == name and version in ("", key[1])]
        if not gone:
            raise RepositoryError(f"the repository has no {reference!r} to remove")
        for key in gone:
            del entries[key]
    for entry in new:
        key = (entry.name, entry.version)
        known = entries.get(key)
        same = known is not None and replace(entry, since=known.since) == known
        entries[key] = known if known is not None and same else replace(entry, since=serial)
    return tuple(entries[key] for key in sorted(entries))


# --- what is there already ---------------------------------------------------------------------


def read_published(folder: str) -> Index | None:
    """The current index of a repository folder; None where there is none yet.

    Its signature must be by a key that this user owns or trusts: what somebody else put on the
    web server would otherwise be signed over.  Raises RepositoryError.
    """
    try:
        with open(os.path.join(folder, SIGNATURE), "rb") as handle:
            signature = keys.read_signature(handle.read())
        path = os.path.join(folder, blob_path("indexes", signature.index))
        with open(path, "rb") as handle:
            data = handle.read()
    except FileNotFoundError as error:
        if os.path.basename(str(error.filename)) == SIGNATURE:
            return None
        raise RepositoryError(
            f"{folder} lacks its own index {error.filename}", "restore it from a mirror"
        ) from None
    trusted = {key.public for key in keys.own_keys()} | {pin.key for pin in keys.pins()}
    keys.verify(data, signature, trusted, folder)
    return decode_index(data)


def _signed_by(folder: str, key_names: Sequence[str]) -> bool:
    with open(os.path.join(folder, SIGNATURE), "rb") as handle:
        signature = keys.read_signature(handle.read())
    own = {key.name: key.public for key in keys.own_keys()}
    return {own[name] for name in key_names} == {key for key, _ in signature.rows}


def _sweep(folder: str) -> None:
    """Remove what a killed publish left half-written; the lock says that none is running."""
    for base, _, names in os.walk(folder):
        for name in names:
            if name.startswith(".") and name.endswith(PARTIAL):
                os.unlink(os.path.join(base, name))


# --- images into packs -------------------------------------------------------------------------


@dataclass
class _Pack:
    """A pack, finished (`blob` is known) or being written."""

    blob: Blob | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    pack: _Pack
    offset: int
    length: int
    stored: int


class Writer:
    """Adds images to a repository's packs and maps; only chunks that it has nowhere yet."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.written = 0
        self._packing = chunks.Packing()
        self._places: dict[str, _Place] = {}
        self._maps: dict[str, Blob] = {}
        self._packs: dict[str, _Pack] = {}
        self._load()

    def _load(self) -> None:
        """Learn from all maps here, also from those that no index names any more."""
        for path, digest in _blobs(self.folder, "maps"):
            with open(path, "rb") as handle:
                data = handle.read()
            try:
                chunk_map = _decode_own(data, digest)
            except ApppotError:
                continue  # a leftover of a newer version, or damage that is nobody's map
            if all(self._is_whole(pack) for pack in chunk_map.packs):
                self._learn(chunk_map)
                self._maps[chunk_map.digest] = Blob(digest, len(data))

    def _is_whole(self, pack: Blob) -> bool:
        try:
            return os.stat(self._path("packs", pack.digest)).st_size == pack.size
        except OSError:
            return False

    def _learn(self, chunk_map: ChunkMap) -> None:
        packs = [self._packs.setdefault(blob.digest, _Pack(blob)) for blob in chunk_map.packs]
        for chunk in chunk_map.chunks:
            place = _Place(packs[chunk.pack], chunk.offset, chunk.length, chunk.stored)
            self._places.setdefault(chunk.digest, place)

    def _path(self, kind: str, digest: str) -> str:
        return os.path.join(self.folder, blob_path(kind, digest))

    def add(self, path: str, digest: str, title: str) -> Blob:
        """Store the image at `path`; returns its map.  An image that is there costs nothing.

        Raises ImageError where the file is not what `digest` says.
        """
        known = self._maps.get(digest)
        if known is not None:
            return known
        size = os.stat(path).st_size
        with Progress(f"publishing {title}", size) as progress:
            whole = hashlib.sha256()
            rows = self._store(path, whole, progress)
            if whole.hexdigest() != digest:
                raise ImageError(
                    f"{path} is damaged: its digest differs", "build, import or pull it again"
                )
        data = _map_of(digest, size, rows).encode()
        blob = Blob(digest_of(data), len(data))
        write_atomic(self._path("maps", blob.digest), data)
        self._maps[digest] = blob
        return blob

    def _store(
        self, path: str, whole: hashlib._Hash, progress: Progress
    ) -> list[tuple[str, _Place]]:
        rows: list[tuple[str, _Place]] = []
        with _PackFile(self) as out:
            for piece in chunks.cut(path):
                whole.update(piece.data)
                name = hashlib.sha256(piece.data).hexdigest()
                place = self._places.get(name)
                if place is None:
                    place = out.append(self._packing.pack(piece.data), len(piece.data))
                    self._places[name] = place
                rows.append((name, place))
                progress.update(piece.offset + len(piece.data))
        return rows


class _PackFile:
    """The pack that is being written; a full one is closed and another begun."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._out: BinaryIO | None = None
        self._temporary = ""
        self._pack = _Pack()
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> _PackFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish()
        elif self._out is not None:
            self._out.close()
            os.unlink(self._temporary)

    def append(self, stored: bytes | memoryview, length: int) -> _Place:
        """Write one chunk; returns where it lies."""
        if self._out is not None and self._size + len(stored) > PACK_BYTES:
            self._finish()
        if self._out is None:
            self._begin()
        assert self._out is not None
        self._out.write(stored)
        self._digest.update(stored)
        place = _Place(self._pack, self._size, length, len(stored))
        self._size += len(stored)
        return place

    def _begin(self) -> None:
        folder = os.path.join(self._writer.folder, "packs")
        os.makedirs(folder, exist_ok=True)
        handle, self._temporary = tempfile.mkstemp(dir=folder, prefix=".", suffix=PARTIAL)
        self._out = os.fdopen(handle, "wb", buffering=1 << 20)
        self._pack, self._digest, self._size = _Pack(), hashlib.sha256(), 0

    def _finish(self) -> None:
        if self._out is None:
            return
        self._out.flush()
        os.fsync(self._out.fileno())
        os.fchmod(self._out.fileno(), 0o644)
        self._out.close()
        self._out = None
        blob = Blob(self._digest.hexdigest(), self._size)
        path = os.path.join(self._writer.folder, blob_path("packs", blob.digest))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.replace(self._temporary, path)
        sync(os.path.dirname(path))
        self._pack.blob = blob
        self._writer.written += self._size


def _map_of(digest: str, size: int, rows: Iterable[tuple[str, _Place]]) -> ChunkMap:
    packs: dict[Blob, int] = {}
    listed = []
    for name, place in rows:
        assert place.pack.blob is not None
        number = packs.setdefault(place.pack.blob, len(packs))
        listed.append(Chunk(name, place.length, number, place.offset, place.stored))
    return ChunkMap(digest, size, tuple(packs), tuple(listed))


def _decode_own(data: bytes, digest: str) -> ChunkMap:
    """A map of this folder, whatever image it is of."""
    return decode_map(data, Blob(digest, len(data)))


def _blobs(folder: str, kind: str) -> list[tuple[str, str]]:
    """(path, digest) of all files of one kind."""
    found = []
    for base, _, names in os.walk(os.path.join(folder, kind)):
        found += [(os.path.join(base, name), name) for name in names if is_digest(name)]
    return sorted(found)


# --- entries -----------------------------------------------------------------------------------


def _image_entry(reference: str, wish: Publication, writer: Writer) -> IndexEntry:
    image = resolve(reference)
    if image.record is None or image.digest is None:
        raise ImageError(
            f"{reference!r} is a file outside the store",
            f"apppot image import {reference}; or --changes {reference}",
        )
    # Under the name that was asked for: an image may have several.
    name, version = _asked(reference, image.record)
    record = replace(image.record, name=name, version=version)
    _require_format(image.format, reference)
    chunk_map = writer.add(image.path, image.digest, f"{name}:{version}")
    entry = _entry_of(record, Kind.IMAGE, image.format, chunk_map)
    return replace(entry, description=wish.description) if wish.description else entry


def _asked(reference: str, record: Record) -> tuple[str, str]:
    name, version = split_reference(reference)
    if not valid_name(name) or record.digest.startswith(name):
        return record.name, record.version
    if version != LATEST:
        return name, version
    same = [
        r.version for _, r in store.list_images() if (r.name, r.digest) == (name, record.digest)
    ]
    return name, record.version if record.version in same or not same else same[-1]


def _entry_of(record: Record, kind: Kind, form: ImageFormat, chunk_map: Blob) -> IndexEntry:
    shared = Record.__dataclass_fields__.keys() & IndexEntry.__dataclass_fields__.keys()
    values = {name: getattr(record, name) for name in shared if name != "format"}
    return IndexEntry(**values, kind=kind, format=form, map=chunk_map)


def _require_format(form: ImageFormat, what: str) -> None:
    if form not in FORMATS:
        raise ImageError(f"{what!r} is a {form} file, which cannot be published", "import it first")


def _changes_entry(text: str, wish: Publication, writer: Writer) -> IndexEntry:
    label, equals, path = text.partition("=")
    if not equals:
        label, path = "", text
    probed = probe(path)
    _require_format(probed.format, path)
    name, _, version = (label or importer.default_name(path)).partition(":")
    if not re.fullmatch(r"[^/\s]+", name):
        raise UsageError(f"{text!r} names no changes", "--changes [NAME[:VERSION]=]FILE")
    check_name(name, version or "1")
    digest = file_digest(path)
    said = changes.read(path)
    text = f"changes to {printable(said.image)}" if said else "changes"
    record = Record(
        digest=digest,
        name=name,
        version=version or "1",
        format=probed.format,
        size=probed.size,
        created=_file_time(path),
        description=wish.description or text,
        parent=said.base if said and is_digest(said.base) else "",
    )
    chunk_map = writer.add(path, digest, f"{name}:{record.version}")
    return _entry_of(record, Kind.CHANGES, probed.format, chunk_map)


def _file_time(path: str) -> str:
    return timestamp(os.stat(path).st_mtime)


# --- the commit --------------------------------------------------------------------------------


def _commit(folder: str, index: Index, key_names: Sequence[str]) -> None:
    data = index.encode()
    decode_index(data)  # what no reader would accept is not published
    digest = digest_of(data)
    write_atomic(os.path.join(folder, blob_path("indexes", digest)), data)
    signature = keys.sign(data, digest, key_names)
    write_atomic(os.path.join(folder, SIGNATURE), signature)
    # Only a convenience from here on: a reader who finds another index here than the signature
    # names takes the one in indexes/.
    write_atomic(os.path.join(folder, INDEX), data)


def _write_page(folder: str, index: Index, key_names: Sequence[str]) -> None:
    own = {key.name: key.public for key in keys.own_keys()}
    text = page.render(index, [own[name] for name in key_names])
    path = os.path.join(folder, "index.html")
    write_atomic(path, text.encode())
    data = index.encode()
    if not _holds(
        os.path.join(folder, INDEX), data
    ):  # a publish was killed between signature and copy
        write_atomic(os.path.join(folder, INDEX), data)


def _holds(path: str, data: bytes) -> bool:
    try:
        with open(path, "rb") as handle:
            return handle.read() == data
    except FileNotFoundError:
        return False


def _prune(folder: str, index: Index) -> int:
    """Remove what the current index does not need; returns the number of files."""
    kept = {digest_of(index.encode())}
    for entry in index.entries:
        with open(os.path.join(folder, blob_path("maps", entry.map.digest)), "rb") as handle:
            chunk_map = decode_map(handle.read(), entry.map)
        kept |= {entry.map.digest, *(pack.digest for pack in chunk_map.packs)}
    stale = [path for kind in FOLDERS for path, name in _blobs(folder, kind) if name not in kept]
    for path in stale:
        os.unlink(path)
    return len(stale)
