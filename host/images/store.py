"""The content-addressed image store.

    <store>/blobs/<sha256>.<format>      the image files, mode 0444, never changed
    <store>/records/<sha256>.json        what is known about one
    <store>/names/<name>/<version>.json  a name's digest; `latest.json` is the newest
    <store>/builds/<key>.json            the digest that a recipe's inputs gave
    <store>/tmp/<random>/                work in progress, locked while its owner lives

An image becomes visible by its record and then its name, each put in place by one rename after
its blob is on disk; a crash leaves at worst a blob without a record, which the next `add` of
the same content adopts.  Reading is on the way of `apppot run`: it opens the files of one name
and lists nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from apppot.host import paths
from apppot.host.errors import ImageError
from apppot.host.images.probe import ImageFormat, Probed, probe, require_bootable

SCHEMA = 1
LATEST = "latest"
DIGEST_PREFIX = "sha256:"
MIN_DIGEST_PREFIX = 6
HEX = frozenset("0123456789abcdef")
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
VERSION_CHARACTERS = NAME_CHARACTERS | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ+~")
MAX_WORD = 128
RESERVED_NAMES = frozenset({"host"})
STALE_SECONDS = 3600.0
COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Record:
    """What is known about an image.  `size` in bytes, `created` ISO 8601 in UTC."""

    digest: str
    name: str
    version: str
    format: str
    size: int
    created: str = ""
    distribution: str = ""
    description: str = ""
    parent: str = ""
    recipe: str = ""
    command: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = ""
    user: str = ""


@dataclass(frozen=True)
class Image:
    """An image that a guest can mount; `digest` and `record` are None outside the store."""

    path: str
    format: ImageFormat
    digest: str | None
    record: Record | None
    probed: Probed


def user_store() -> str:
    """The store that is written to."""
    return paths.image_stores()[-1]


# --- reading -----------------------------------------------------------------------------------


def resolve(reference: str) -> Image:
    """The image that `reference` names: a path, name[:version], or (prefix of a) digest.

    The site's store is asked before the user's.  Raises ImageError for what is not there,
    ambiguous, damaged, or must be imported first.
    """
    if "/" in reference or os.path.isfile(reference):
        return _from_path(reference)
    for store in paths.image_stores():
        digest = _named_digest(store, reference)
        if digest is not None:
            return _from_store(store, digest, reference)
    match = _by_digest(reference)
    if match is not None:
        return _from_store(*match, reference)
    raise _not_found(reference)


def _from_path(path: str) -> Image:
    probed = probe(path)
    require_bootable(probed, path)
    return Image(path, probed.format, None, None, probed)


def _from_store(store: str, digest: str, reference: str) -> Image:
    record = read_record(store, digest)
    if record is None:
        raise ImageError(
            f"image {reference!r} has no record in {store}", "build, import or pull it again"
        )
    path = blob_path(store, record)
    probed = probe(path)
    require_bootable(probed, path)
    return Image(path, probed.format, digest, record, probed)


def blob_path(store: str, record: Record) -> str:
    """Where the image file of `record` lies."""
    return os.path.join(store, "blobs", f"{record.digest}.{record.format}")


def split_reference(reference: str) -> tuple[str, str]:
    """ "name[:version]" → (name, version), `latest` where none is given; unchecked."""
    name, _, version = reference.partition(":")
    return name, version or LATEST


def valid_name(name: str) -> bool:
    """Whether `name` can be an image's name (and so one harmless path component)."""
    return _word(name, NAME_CHARACTERS) and name not in RESERVED_NAMES


def valid_version(version: str) -> bool:
    """Whether `version` can be an image's version (and so one harmless path component)."""
    return _word(version, VERSION_CHARACTERS)


def _word(text: str, characters: frozenset[str]) -> bool:
    return 0 < len(text) <= MAX_WORD and text[0] not in "._-+~" and characters.issuperset(text)


def _named_digest(store: str, reference: str) -> str | None:
    name, version = split_reference(reference)
    if not valid_name(name) or not valid_version(version):
        return None
    return _read_digest(os.path.join(store, "names", name, f"{version}.json"))


def _read_digest(path: str) -> str | None:
    data = _read_json(path)
    digest = data.get("digest") if data else None
    return digest if isinstance(digest, str) and is_digest(digest) else None


def is_digest(text: str) -> bool:
    """Whether `text` is a whole digest: 64 lower-case hexadecimal digits."""
    return len(text) == 64 and HEX.issuperset(text)


def _by_digest(reference: str) -> tuple[str, str] | None:
    prefix = reference.removeprefix(DIGEST_PREFIX)
    if len(prefix) < MIN_DIGEST_PREFIX or not HEX.issuperset(prefix):
        return None
    found: dict[str, str] = {}
    for store in paths.image_stores():
        for digest in _digests(store, prefix):
            found.setdefault(digest, store)
    if len(found) > 1:
        raise ImageError(f"{reference!r} fits {len(found)} images", "give more digits")
    return next(((store, digest) for digest, store in found.items()), None)


def _digests(store: str, prefix: str = "") -> list[str]:
    if is_digest(prefix):
        there = os.path.exists(os.path.join(store, "records", f"{prefix}.json"))
        return [prefix] if there else []
    names = (entry.removesuffix(".json") for entry in _listdir(os.path.join(store, "records")))
    return sorted(name for name in names if is_digest(name) and name.startswith(prefix))


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _read_json(path: str) -> dict[str, Any] | None:
    """The object in `path`; None when there is none.  Damage is an error, not absence."""
    try:
        with open(path, encoding="utf-8") as handle:
            data = json.load(handle)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be read: {error}", "remove it and try again") from None
    if not isinstance(data, dict) or not isinstance(data.get("schema"), int):
        raise ImageError(f"{path} is damaged", "remove it and try again")
    if data["schema"] > SCHEMA:
        raise ImageError(f"{path} was written by a newer AppPot", "update this AppPot")
    return data


def read_record(store: str, digest: str) -> Record | None:
    """The record of one image, None when that store does not have it."""
    path = os.path.join(store, "records", f"{digest}.json")
    data = _read_json(path)
    if data is None:
        return None
    known = {key: data[key] for key in Record.__dataclass_fields__ if key in data}
    try:
        known["command"] = tuple(known.get("command", ()))
        return Record(**known)
    except TypeError:
        raise ImageError(f"{path} is damaged", "build, import or pull the image again") from None


def list_images() -> list[tuple[str, Record]]:
    """(store, record) of every name:version, the site's first, sorted by name and version.

    Images that have lost their names come last, under the name in their record.
    """
    rows: list[tuple[str, Record]] = []
    for store in paths.image_stores():
        named = list(_named_records(store))
        seen = {record.digest for record in named}
        bare = (read_record(store, digest) for digest in _digests(store) if digest not in seen)
        unnamed = [replace(record, version="") for record in bare if record is not None]
        key = lambda record: (record.name, record.version)  # noqa: E731
        rows += [(store, record) for record in sorted(named, key=key) + sorted(unnamed, key=key)]
    return rows


def _named_records(store: str) -> Iterator[Record]:
    root = os.path.join(store, "names")
    for name in _listdir(root):
        for entry in _listdir(os.path.join(root, name)):
            version = entry.removesuffix(".json")
            digest = None
            if entry.endswith(".json") and version != LATEST:
                digest = _read_digest(os.path.join(root, name, entry))
            record = read_record(store, digest) if digest else None
            if record is not None:
                yield replace(record, name=name, version=version)


def _not_found(reference: str) -> ImageError:
    import difflib

    there = sorted({f"{record.name}:{record.version}" for _, record in list_images()})
    words = sorted({name.partition(":")[0] for name in there} | set(there))
    near = difflib.get_close_matches(reference, words, 3, 0.6)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif there:
        shown = ", ".join(there[:8]) + (" …" if len(there) > 8 else "")
        hint = f"there are: {shown}; more with apppot image build, import or pull"
    else:
        hint = "the store is empty: apppot image build debian-12 (or use the image `host`)"
    return ImageError(f"there is no image {reference!r}", hint)


# --- writing -----------------------------------------------------------------------------------


def check_name(name: str, version: str) -> None:
    """Raise ImageError where name or version could not be stored."""
    if not valid_name(name):
        raise ImageError(
            f"{name!r} cannot be an image's name",
            "lower-case letters, digits, '.', '_' and '-', not `host`",
        )
    if not valid_version(version) or version == LATEST:
        raise ImageError(f"{version!r} cannot be an image's version", "for instance 1 or 12.5")


@contextmanager
def workspace() -> Iterator[str]:
    """A private directory inside the user's store, on the same file system as the blobs.

    Locked while it is in use and removed afterwards; what a crash left is swept by a later
    caller, by age and lock.
    """
    import fcntl
    import shutil
    import tempfile

    root = os.path.join(user_store(), "tmp")
    _make_directory(root)
    _sweep(root)
    directory = tempfile.mkdtemp(dir=root)
    lock = os.open(os.path.join(directory, "lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _sweep(root: str) -> None:
    import fcntl
    import shutil
    import time

    for entry in _listdir(root):
        directory = os.path.join(root, entry)
        try:
            if time.time() - os.stat(directory).st_mtime < STALE_SECONDS:
                continue
            lock = os.open(os.path.join(directory, "lock"), os.O_CREAT | os.O_RDWR, 0o600)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except OSError:
            pass  # its owner lives
        finally:
            os.close(lock)


def add(file: str, record: Record, digest: str | None = None) -> Record:
    """Move `file` (from a `workspace`) into the store; returns the completed record.

    `record` brings the metadata; digest, size and creation time are filled in here.  `digest`
    is the file's SHA-256 where the caller computed it on the way.  Adding the same content
    again is no error, by any number of writers at once.  A name that pointed elsewhere moves.
    """
    check_name(record.name, record.version)
    store = user_store()
    digest = digest or file_digest(file)
    done = replace(
        record,
        digest=digest,
        size=os.stat(file).st_size,
        created=record.created or _now(),
    )
    blob = blob_path(store, done)
    _make_directory(os.path.dirname(blob))
    os.chmod(file, 0o444)
    _sync(file)
    os.replace(file, blob)
    _sync(os.path.dirname(blob))
    known = read_record(store, digest)
    if known is not None:  # the same content under another name keeps its first birthday
        done = replace(done, created=known.created)
    _write_json(os.path.join(store, "records", f"{digest}.json"), asdict(done))
    tag(store, done.name, done.version, digest)
    return done


def tag(store: str, name: str, version: str, digest: str) -> None:
    """Let name:version, and the name's `latest`, be `digest`."""
    for word in (version, LATEST):
        _write_json(os.path.join(store, "names", name, f"{word}.json"), {"digest": digest})


def remember_build(key: str, digest: str) -> None:
    """Note that the inputs with digest `key` gave the image `digest`."""
    _write_json(os.path.join(user_store(), "builds", f"{key}.json"), {"digest": digest})


def find_build(key: str) -> Record | None:
    """The image that the inputs with digest `key` gave, when it is still whole."""
    store = user_store()
    digest = _read_digest(os.path.join(store, "builds", f"{key}.json"))
    record = read_record(store, digest) if digest else None
    if record is None:
        return None
    try:
        return record if probe(blob_path(store, record)).size == record.size else None
    except ImageError:
        return None


def file_digest(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    import hashlib

    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _now() -> str:
    import time

    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ImageError(
            f"the image store {path} cannot be made: {error.strerror}",
            "set XDG_DATA_HOME to a directory that you can write to",
        ) from None


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: str, data: dict[str, Any]) -> None:
    """Put an object in place in one step: temporary file, fsync, rename, fsync."""
    import tempfile

    directory = os.path.dirname(path)
    _make_directory(directory)
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"schema": SCHEMA, **data}, out, indent=1, sort_keys=True)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync(directory)
