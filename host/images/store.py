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
from dataclasses import asdict, replace
from typing import Any

from apppot.host.common import files, paths
from apppot.host.common.errors import ImageError
from apppot.host.common.files import listdir
from apppot.host.common.units import timestamp
from apppot.host.images.probe import probe
from apppot.host.images.record import (
    LATEST,
    Record,
    check_name,
    is_digest,
    split_reference,
    valid_name,
    valid_version,
)
from apppot.host.images.workspace import locked, make_directory, user_store

_VERSION_KEY = "schema"  # in every file of JSON here

# --- reading -----------------------------------------------------------------------------------


def blob_path(store: str, record: Record) -> str:
    """Where the image file of `record` lies."""
    return os.path.join(store, "blobs", f"{record.digest}.{record.format}")


def named_digest(store: str, reference: str) -> str | None:
    name, version = split_reference(reference)
    if not valid_name(name) or not valid_version(version):
        return None
    return read_digest(name_path(store, name, version))


def read_digest(path: str) -> str | None:
    """The digest in a name's or build's file; None where there is none."""
    data = read_note(path)
    digest = data.get("digest") if data else None
    return digest if isinstance(digest, str) and is_digest(digest) else None


def digests_in(store: str, prefix: str = "") -> list[str]:
    if is_digest(prefix):
        there = os.path.exists(os.path.join(store, "records", f"{prefix}.json"))
        return [prefix] if there else []
    names = (entry.removesuffix(".json") for entry in listdir(os.path.join(store, "records")))
    return sorted(name for name in names if is_digest(name) and name.startswith(prefix))


def read_note(path: str) -> dict[str, Any] | None:
    return files.require_json(path, ImageError, "remove it and try again", key=_VERSION_KEY)


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
    data = read_note(path)
    if data is not None and "format" in data:
        return _parse_record(path)
    return replace(record, name=name, version=record.version if version == LATEST else version)


def name_path(store: str, name: str, version: str) -> str:
    """The file of one name."""
    return os.path.join(store, "names", name, f"{version}.json")


def _parse_record(path: str) -> Record | None:
    data = read_note(path)
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
        bare = (read_record(store, digest) for digest in digests_in(store) if digest not in seen)
        unnamed = [replace(record, version="") for record in bare if record is not None]
        key = lambda record: (record.name, record.version)  # noqa: E731
        rows += [(store, record) for record in sorted(named, key=key) + sorted(unnamed, key=key)]
    return rows


def _named_records(store: str) -> Iterator[Record]:
    root = os.path.join(store, "names")
    for name in listdir(root):
        for version in versions(store, name):
            record = named_record(store, name, version)
            if record is not None:
                yield record


def versions(store: str, name: str) -> list[str]:
    """The versions that the store has of `name`, without `latest`."""
    entries = listdir(os.path.join(store, "names", name))
    found = {entry.removesuffix(".json") for entry in entries if entry.endswith(".json")}
    return sorted(version for version in found if valid_version(version) and version != LATEST)


def names_of(store: str, digest: str) -> list[tuple[str, str]]:
    """(name, version) of all names of one content."""
    pairs = [
        (name, version)
        for name in listdir(os.path.join(store, "names"))
        for version in versions(store, name)
    ]
    return sorted(pair for pair in pairs if read_digest(name_path(store, *pair)) == digest)


# --- writing -----------------------------------------------------------------------------------


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
        make_directory(os.path.dirname(blob))
        os.chmod(file, 0o444)
        files.sync(file)
        os.replace(file, blob)
        files.sync(os.path.dirname(blob))
        known = read_record(store, digest)
        if known is not None:  # the same content under another name keeps its first birthday
            done = replace(done, created=known.created)
        else:
            write_note(os.path.join(store, "records", f"{digest}.json"), asdict(done))
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
        write_note(name_path(store, record.name, word), asdict(record))


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


def remember_build(key: str, digest: str) -> None:
    """Note that the inputs with digest `key` gave the image `digest`."""
    write_note(os.path.join(user_store(), "builds", f"{key}.json"), {"digest": digest})


def remember_import(key: str, record: Record) -> None:
    """Note that the foreign image `key` became `record`, with that record's own command."""
    write_note(os.path.join(user_store(), "builds", f"{key}.json"), asdict(record))


def find_build(key: str) -> Record | None:
    """The image that the inputs with digest `key` gave, when it is still whole."""
    store = user_store()
    path = os.path.join(store, "builds", f"{key}.json")
    digest = read_digest(path)
    record = read_record(store, digest) if digest else None
    if record is None:
        return None
    own = read_note(path)
    if own is not None and "format" in own:
        record = _parse_record(path) or record
    try:
        return record if probe(blob_path(store, record)).size == record.size else None
    except ImageError:
        return None


def write_note(path: str, data: dict[str, Any]) -> None:
    make_directory(os.path.dirname(path))
    files.write_json(path, data, 0o644, key=_VERSION_KEY)
