"""What a repository says about itself: the signed index, and one map of chunks per image.

Both are data of a stranger until their signature or digest is checked, and data of a publisher
who may be hostile afterwards: everything is bounds-checked here, once, and nothing of it is ever
a path except through a checked digest or name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from apppot.host.common.errors import RepositoryError
from apppot.host.common.frozen import frozen
from apppot.host.images.probe import ImageFormat
from apppot.host.images.record import HEX, LATEST, Record, valid_name, valid_version

SCHEMA = 1
INDEX = "index.json"
SIGNATURE = "index.json.sig"
MAX_INDEX = 32 << 20
MAX_SIGNATURE = 1 << 16
MAX_ENTRIES = 100_000
MAX_IMAGE = 1 << 44
MAX_MAP = 512 << 20
MAX_CHUNK = 1 << 20
MAX_PACK = 1 << 30
MAX_SERIAL = 1 << 53
MAX_TEXT = 4096
MAX_WORDS = 1000
# A COW file names another file of the host; archives cannot be mounted.
FORMATS = frozenset({ImageFormat.SQUASHFS, ImageFormat.EROFS, ImageFormat.EXT4, ImageFormat.RAW})


class Kind(StrEnum):
    """What an entry of the index is."""

    IMAGE = "image"
    CHANGES = "changes"


@frozen
class Blob:
    """A file of the repository: its SHA-256 and its length in bytes."""

    digest: str
    size: int


@frozen
class IndexEntry:
    """One version of one image or changes file; `parent` is the digest of its base, or "".

    `size` in bytes, `since` the serial of the index in which it appeared.
    """

    name: str
    version: str
    kind: Kind
    digest: str
    format: ImageFormat
    size: int
    map: Blob
    since: int = 0
    created: str = ""
    distribution: str = ""
    description: str = ""
    parent: str = ""
    recipe: str = ""
    command: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = ""
    user: str = ""

    def record(self) -> Record:
        """The store's record of this image."""
        names = Record.__dataclass_fields__.keys() & IndexEntry.__dataclass_fields__.keys()
        values = {name: getattr(self, name) for name in names}
        return Record(**{**values, "format": str(self.format)})


@frozen
class Index:
    """All that a repository offers.  `serial` only ever grows; `time` is ISO 8601 in UTC;
    `id` tells this repository from every other one, on whichever mirror."""

    id: str
    serial: int
    time: str
    entries: tuple[IndexEntry, ...]

    def find(self, name: str, version: str) -> IndexEntry | None:
        """The entry of name:version; for "latest" the one that was published last."""
        found = [entry for entry in self.entries if entry.name == name]
        if version != LATEST:
            found = [entry for entry in found if entry.version == version]
        return max(found, key=lambda e: (e.since, e.created, e.version), default=None)

    def encode(self) -> bytes:
        """The bytes that are signed: the same index gives the same bytes."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True)
        return text.encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of an image's bytes, `length` long, and where it lies in a pack.

    `stored` < `length` means that it is one zstd frame there.
    """

    digest: str
    length: int
    pack: int
    offset: int
    stored: int


@frozen
class ChunkMap:
    """How an image is put together: its chunks in order, in packs of the repository."""

    digest: str
    size: int
    packs: tuple[Blob, ...]
    chunks: tuple[Chunk, ...]

    def encode(self) -> bytes:
        """Compressed JSON; deterministic."""
        import zstandard

        data = {
            "schema": SCHEMA,
            "digest": self.digest,
            "size": self.size,
            "packs": [[pack.digest, pack.size] for pack in self.packs],
            "chunks": [[c.digest, c.length, c.pack, c.offset, c.stored] for c in self.chunks],
        }
        text = json.dumps(data, separators=(",", ":"))
        return zstandard.ZstdCompressor(level=9).compress(text.encode())


def blob_path(folder: str, digest: str) -> str:
    """Where a content-addressed file lies, below the repository's root."""
    return f"{folder}/{digest[:2]}/{digest}"


def digest_of(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


# --- reading what others wrote -----------------------------------------------------------------


def decode_index(data: bytes) -> Index:
    """Read and check an index.  Raises RepositoryError naming what is wrong with it."""
    try:
        raw = json.loads(data)
        _schema(raw, "index")
        entries = raw["entries"]
        _require(isinstance(entries, list) and len(entries) <= MAX_ENTRIES, "entries")
        index = Index(
            _hex(raw["id"], "id", 32),
            _number(raw["serial"], "serial", 1, MAX_SERIAL),
            _text(raw["time"], "time"),
            tuple(_entry(entry) for entry in entries),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RepositoryError(f"the repository's index is damaged: {_say(error)}") from None
    names = {(entry.name, entry.version) for entry in index.entries}
    if len(names) != len(index.entries):
        raise RepositoryError("the repository's index names an image twice")
    return index


def _say(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)[:200]


def _schema(raw: Any, what: str) -> None:
    _require(isinstance(raw, dict), what)
    if raw["schema"] != SCHEMA:
        raise RepositoryError(
            f"the repository's {what} has the unknown schema {str(raw['schema'])[:20]!r}",
            "update this AppPot",
        )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"{what!r} makes no sense")


def _number(value: Any, what: str, low: int, high: int) -> int:
    _require(isinstance(value, int) and not isinstance(value, bool) and low <= value <= high, what)
    return int(value)


def _text(value: Any, what: str, limit: int = MAX_TEXT) -> str:
    _require(isinstance(value, str) and len(value) <= limit, what)
    return str(value)


def _hex(value: Any, what: str, digits: int = 64) -> str:
    _require(isinstance(value, str) and len(value) == digits, what)
    _require(HEX.issuperset(value), what)
    return str(value)


def _line(value: Any, what: str) -> str:
    """Text that goes to terminals: what is not printable becomes `?`."""
    return "".join(c if c.isprintable() else "?" for c in _text(value, what))


def _entry(raw: Any) -> IndexEntry:
    _require(isinstance(raw, dict), "entries")
    name, version = _text(raw["name"], "name"), _text(raw["version"], "version")
    _require(valid_name(name), "name")
    _require(valid_version(version) and version != LATEST, "version")
    form = ImageFormat(_text(raw["format"], "format"))
    _require(form in FORMATS, "format")
    chunk_map = raw["map"]
    _require(isinstance(chunk_map, dict), "map")
    words, env = raw.get("command", []), raw.get("env", {})
    _require(isinstance(words, list) and len(words) <= MAX_WORDS, "command")
    _require(isinstance(env, dict) and len(env) <= MAX_WORDS, "env")
    return IndexEntry(
        name,
        version,
        Kind(_text(raw["kind"], "kind")),
        _hex(raw["digest"], "digest"),
        form,
        _number(raw["size"], "size", 1, MAX_IMAGE),
        Blob(_hex(chunk_map["digest"], "map"), _number(chunk_map["size"], "map", 1, MAX_MAP)),
        _number(raw.get("since", 0), "since", 0, MAX_SERIAL),
        created=_line(raw.get("created", ""), "created"),
        distribution=_line(raw.get("distribution", ""), "distribution"),
        description=_line(raw.get("description", ""), "description"),
        parent=_hex(raw["parent"], "parent") if raw.get("parent") else "",
        recipe=_line(raw.get("recipe", ""), "recipe"),
        command=tuple(_word(word, "command") for word in words),
        env={_word(key, "env"): _word(value, "env") for key, value in env.items()},
        workdir=_line(raw.get("workdir", ""), "workdir"),
        user=_line(raw.get("user", ""), "user"),
    )


def _word(value: Any, what: str) -> str:
    """Text that reaches a guest's exec: no NUL."""
    text = _text(value, what, 1 << 16)
    _require("\0" not in text, what)
    return text


def decode_map(
    data: bytes, blob: Blob, image: Blob | None = None, limit: int = MAX_MAP
) -> ChunkMap:
    """Read and check the map `blob`, which must be of `image` where that is given.

    Raises RepositoryError.  What it decompresses to is bounded by `limit` and the image's size.
    """
    if image is not None:
        limit = min(limit, (1 << 20) + image.size // 4)
    if digest_of(data) != blob.digest:
        raise RepositoryError("a map of chunks is corrupted: its digest differs")
    try:
        raw = json.loads(_inflate(data, limit))
        _schema(raw, "map")
        found = Blob(_hex(raw["digest"], "digest"), _number(raw["size"], "size", 1, MAX_IMAGE))
        _require(image is None or found == image, "digest")
        packs = tuple(
            Blob(_hex(name, "packs"), _number(length, "packs", 1, MAX_PACK))
            for name, length in raw["packs"]
        )
        chunks = tuple(_chunk(row, packs) for row in raw["chunks"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RepositoryError(f"a map of chunks is damaged: {_say(error)}") from None
    if sum(chunk.length for chunk in chunks) != found.size:
        raise RepositoryError("a map of chunks does not add up to its image")
    return ChunkMap(found.digest, found.size, packs, chunks)


def _chunk(row: Any, packs: tuple[Blob, ...]) -> Chunk:
    digest, length, pack, offset, stored = row
    _hex(digest, "chunks")
    _number(length, "chunks", 1, MAX_CHUNK)
    size = packs[_number(pack, "chunks", 0, len(packs) - 1)].size
    _number(stored, "chunks", 1, length)
    _number(offset, "chunks", 0, size - stored)
    return Chunk(digest, length, pack, offset, stored)


def _inflate(data: bytes, limit: int) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            text: bytes = reader.read(limit + 1)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    _require(len(text) <= limit, "length")
    return text
