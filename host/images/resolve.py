"""From a reference, as a user writes it, to an image."""

from __future__ import annotations

import os

from apppot.host.common import paths
from apppot.host.common.errors import ImageError
from apppot.host.images.probe import probe, require_bootable
from apppot.host.images.record import (
    DIGEST_PREFIX,
    HEX,
    Image,
    Record,
    is_transport,
    split_reference,
)
from apppot.host.images.store import (
    blob_path,
    digests_in,
    list_images,
    named_digest,
    named_record,
    read_record,
)
from apppot.host.images.workspace import user_store

MIN_DIGEST_PREFIX = 6


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
        digest = named_digest(store, reference)
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
        if named_digest(store, reference) is not None:
            record = named_record(store, *split_reference(reference))
            if record is not None:
                return blob_path(store, record), record
    match = _by_digest(reference)
    record = read_record(*match) if match else None
    return (blob_path(match[0], record), record) if match and record else None


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


def _by_digest(reference: str) -> tuple[str, str] | None:
    prefix = reference.removeprefix(DIGEST_PREFIX)
    if len(prefix) < MIN_DIGEST_PREFIX or not HEX.issuperset(prefix):
        return None
    found: dict[str, str] = {}
    for store in paths.image_stores():
        for digest in digests_in(store, prefix):
            found.setdefault(digest, store)
    if len(found) > 1:
        raise ImageError(f"{reference!r} fits {len(found)} images", "give more digits")
    return next(((store, digest) for digest, store in found.items()), None)


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
