"""The content-addressed image store.

    <store>/blobs/<sha256>.<format>      the image files, mode 0444, never changed
    <store>/records/<sha256>.json        what is known about one, as it first came
    <store>/names/<name>/<version>.json  a name's own record; `latest.json` is the newest
    <store>/builds/<key>.json            the digest that a recipe's inputs gave
    <store>/tmp/<random>/                work in progress, locked while its owner lives
    <store>/lock                         shared by who adds, exclusive for who removes

An image becomes visible by its record and then its name, each put in place by one rename after
its blob is on disk; a crash leaves at worst a blob without a record, which the next `add` of
the same content adopts and `prune` removes.  Several names may have the same content: each
keeps its own command, environment and description.  Reading is on the way of `apppot run`: it
opens the files of one name and lists nothing.  Who uses an image holds a shared lock on its
file, so that `apppot.host.images.upkeep` leaves it in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from apppot.host.common import files, paths
from apppot.host.common.errors import ImageError
from apppot.host.common.units import timestamp
from apppot.host.images.probe import ImageFormat, Probed, probe, require_bootable

LATEST = "latest"
DIGEST_PREFIX = "sha256:"
MIN_DIGEST_PREFIX = 6
HEX = frozenset("0123456789abcdef")
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
VERSION_CHARACTERS = NAME_CHARACTERS | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ+~")
MAX_WORD = 128
# The host's root, and what stands before a colon as the kind of a reference.
TRANSPORTS = frozenset({"oci", "docker-archive", "docker"})
RESERVED_NAMES = frozenset({"host"}) | TRANSPORTS
STALE_SECONDS = 3600.0
_TICK = 2.0  # seconds: the coarsest time that file systems keep


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
    entrypoint: tuple[str, ...] = ()
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
    """The image that `reference` names: a path, name[:version], (prefix of a) digest, or an
    image of other tools (`oci:`, `docker-archive:`, `docker://`), which is imported once.

    The site's store is asked before the user's.  Raises ImageError for what is not there,
    ambiguous, damaged, or must be imported first.
    """
    if is_transport(reference):
        from apppot.host.images.importing import transports

        return in_store(transports.cached(reference))
    if "/" in reference or os.path.isfile(reference):
        return _from_path(reference)
    for store in paths.image_stores():
        digest = _named_digest(store, reference)
        if digest is not None:
            name, version = split_reference(reference)
            return _from_store(store, reference, named_record(store, name, version))
    match = _by_digest(reference)
    if match is not None:
        return _from_store(match[0], reference, read_record(*match))
    raise _not_found(reference)


def find(reference: str) -> tuple[str, Record] | None:
    """(file, record) of an image in a store, whatever state the file is in."""
    for store in paths.image_stores():
        if _named_digest(store, reference) is not None:
            record = named_record(store, *split_reference(reference))
            if record is not None:
                return blob_path(store, record), record
    match = _by_digest(reference)
    record = read_record(*match) if match else None
    return (blob_path(match[0], record), record) if match and record else None


def is_transport(reference: str) -> bool:
    """Whether `reference` names an image of other tools, like oci:DIR."""
    kind, colon, rest = reference.partition(":")
    return bool(colon and rest) and kind in TRANSPORTS


def in_store(record: Record) -> Image:
    """The image of a record from the user's store."""
    path = blob_path(user_store(), record)
    probed = probe(path)
    return Image(path, probed.format, record.digest, record, probed)


def _from_path(path: str) -> Image:
    probed = probe(path)
    require_bootable(probed, path)
    return Image(path, probed.format, None, None, probed)


def _from_store(store: str, reference: str, record: Record | None) -> Image:
    if record is None:
        raise ImageError(
            f"image {reference!r} has no record in {store}", "build, import or pull it again"
        )
    path = blob_path(store, record)
    probed = probe(path)
    require_bootable(probed, path)
    return Image(path, probed.format, record.digest, record, probed)


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
    return read_digest(name_path(store, name, version))


def read_digest(path: str) -> str | None:
    """The digest in a name's or build's file; None where there is none."""
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
    return files.read_json(path, ImageError, "remove it and try again")


def read_record(store: str, digest: str) -> Record | None:
    """The record of one image, None when that store does not have it."""
    return _parse_record(os.path.join(store, "records", f"{digest}.json"))


def named_record(store: str, name: str, version: str) -> Record | None:
    """The record of one name, None where that store has no such name or no longer its image.

    A name from before names had records of their own shows the image's.
    """
    path = name_path(store, name, version)
    digest = read_digest(path)
    record = read_record(store, digest) if digest else None
    if record is None:
        return None
    data = _read_json(path)
    if data is not None and "format" in data:
        return _parse_record(path)
    return replace(record, name=name, version=record.version if version == LATEST else version)


def name_path(store: str, name: str, version: str) -> str:
    """The file of one name."""
    return os.path.join(store, "names", name, f"{version}.json")


def _parse_record(path: str) -> Record | None:
    data = _read_json(path)
    if data is None:
        return None
    known = {key: data[key] for key in Record.__dataclass_fields__ if key in data}
    try:
        for key in ("command", "entrypoint"):
            known[key] = tuple(known.get(key, ()))
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
        for version in versions(store, name):
            record = named_record(store, name, version)
            if record is not None:
                yield record


def versions(store: str, name: str) -> list[str]:
    """The versions that the store has of `name`, without `latest`."""
    entries = _listdir(os.path.join(store, "names", name))
    found = {entry.removesuffix(".json") for entry in entries if entry.endswith(".json")}
    return sorted(version for version in found if valid_version(version) and version != LATEST)


def names_of(store: str, digest: str) -> list[tuple[str, str]]:
    """(name, version) of all names of one content."""
    pairs = [
        (name, version)
        for name in _listdir(os.path.join(store, "names"))
        for version in versions(store, name)
    ]
    return sorted(pair for pair in pairs if read_digest(name_path(store, *pair)) == digest)


def _not_found(reference: str) -> ImageError:
    import difflib

    named = [record for _, record in list_images() if record.version]
    there = sorted({f"{record.name}:{record.version}" for record in named})
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
    for directory in abandoned(STALE_SECONDS):
        shutil.rmtree(directory, ignore_errors=True)
    with locked(user_store()):  # `prune` must not come between the two
        directory = tempfile.mkdtemp(dir=root)
        place = os.path.join(directory, "lock")
        lock = os.open(place, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def abandoned(age: float) -> Iterator[str]:
    """Workspaces untouched for `age` seconds whose owner does not live; locked while looked at."""
    import fcntl
    import time

    root = os.path.join(user_store(), "tmp")
    for entry in _listdir(root):
        directory = os.path.join(root, entry)
        try:
            if time.time() - os.stat(directory).st_mtime < age:
                continue
            lock = os.open(os.path.join(directory, "lock"), os.O_CREAT | os.O_RDWR, 0o600)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield directory
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(lock)


def add(file: str, record: Record, digest: str | None = None, *, move: bool = True) -> Record:
    """Move `file` (from a `workspace`) into the store; returns the completed record.

    `record` brings the metadata; digest, size and creation time are filled in here.  `digest`
    is the file's SHA-256 where the caller computed it on the way.  Adding the same content
    again is no error, by any number of writers at once.  A name that pointed elsewhere moves,
    or is an ImageError without `move`.
    """
    check_name(record.name, record.version)
    store = user_store()
    digest = digest or files.file_digest(file)
    done = replace(
        record,
        digest=digest,
        size=os.stat(file).st_size,
        created=record.created or timestamp(),
    )
    with locked(store):
        if not move:
            check_free(store, done.name, done.version, digest)
        blob = blob_path(store, done)
        _make_directory(os.path.dirname(blob))
        os.chmod(file, 0o444)
        files.sync(file)
        os.replace(file, blob)
        files.sync(os.path.dirname(blob))
        known = read_record(store, digest)
        if known is not None:  # the same content under another name keeps its first birthday
            done = replace(done, created=known.created)
        else:
            _write_json(os.path.join(store, "records", f"{digest}.json"), asdict(done))
        write_name(store, done)
    return done


def check_free(store: str, name: str, version: str, digest: str) -> None:
    """Raise ImageError where name:version is another image than `digest`."""
    there = read_digest(name_path(store, name, version))
    if there not in (None, digest):
        raise ImageError(
            f"{name}:{version} is already the name of another image ({str(there)[:12]})",
            "give another name or version (--name), or move the name with --force",
        )


def write_name(store: str, record: Record) -> None:
    """Let the record's name:version, and the name's `latest`, be this record."""
    for word in (record.version, LATEST):
        _write_json(name_path(store, record.name, word), asdict(record))


def tag(store: str, name: str, version: str, digest: str) -> None:
    """Let name:version, and the name's `latest`, be the image `digest`, with what is known of it.

    A name that has this content already keeps its own record.
    """
    with locked(store):
        there = named_record(store, name, version)
        if there is None or there.digest != digest:
            there = read_record(store, digest)
        if there is None:
            raise ImageError(f"there is no image {digest[:12]}", "apppot image list")
        write_name(store, replace(there, name=name, version=version))


@contextmanager
def locked(store: str, *, exclusive: bool = False) -> Iterator[None]:
    """Hold the store's lock: shared while an image becomes visible, exclusive while one goes."""
    import fcntl

    _make_directory(store)
    lock = os.open(os.path.join(store, "lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def hold(path: str) -> int:
    """A descriptor with a shared lock on an image file; it stays usable and in place.

    The lock goes with the descriptor, also by kill -9.  Raises ImageError where the image was
    removed since it was found.
    """
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ImageError(f"image {path!r} cannot be read: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for no longer than a removal takes
    except OSError:
        return descriptor  # a file system without locks: the open file stays valid
    if not os.path.exists(path):
        os.close(descriptor)
        raise ImageError(f"image {path!r} was removed just now", "apppot image list")
    return descriptor


def remember_build(key: str, digest: str) -> None:
    """Note that the inputs with digest `key` gave the image `digest`."""
    _write_json(os.path.join(user_store(), "builds", f"{key}.json"), {"digest": digest})


def remember_import(key: str, record: Record) -> None:
    """Note that the foreign image `key` became `record`, with that record's own command."""
    _write_json(os.path.join(user_store(), "builds", f"{key}.json"), asdict(record))


def find_build(key: str) -> Record | None:
    """The image that the inputs with digest `key` gave, when it is still whole."""
    store = user_store()
    path = os.path.join(store, "builds", f"{key}.json")
    digest = read_digest(path)
    record = read_record(store, digest) if digest else None
    if record is None:
        return None
    own = _read_json(path)
    if own is not None and "format" in own:
        record = _parse_record(path) or record
    try:
        return record if probe(blob_path(store, record)).size == record.size else None
    except ImageError:
        return None


def digest_of(image: Image) -> str:
    """The digest of an image's file, computed for one outside the store."""
    return image.digest or files.file_digest(image.path)


def known_digest(path: str) -> str:
    """A file's digest, not computed again while the file is the same by size and times."""
    import hashlib
    import time

    found = os.stat(path)
    state = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    note = os.path.join(paths.cache_home(), "digests", f"{name}.json")
    try:
        known = _read_json(note)
    except ImageError:
        known = None
    if known is not None and known.get("state") == state and is_digest(str(known.get("digest"))):
        return str(known["digest"])
    digest = files.file_digest(path)
    # A change in the same tick of the clock would not show.
    if time.time() - max(found.st_mtime, found.st_ctime) > _TICK:
        try:
            _write_json(note, {"digest": digest, "state": state})
        except (OSError, ImageError):
            pass  # no place to remember it
    return digest


def _make_directory(path: str) -> None:
    if os.path.isdir(path):
        return
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise ImageError(
            f"the image store {path} cannot be made: {error.strerror}",
            "set XDG_DATA_HOME to a directory that you can write to",
        ) from None


def _write_json(path: str, data: dict[str, Any]) -> None:
    _make_directory(os.path.dirname(path))
    files.write_json(path, data)
