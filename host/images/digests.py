"""Digests of image files, remembered."""

from __future__ import annotations

import os

from apppot.host.common import files, paths
from apppot.host.common.errors import ImageError
from apppot.host.images.record import Image, is_digest
from apppot.host.images.store import read_note, write_note

_TICK = 2.0  # seconds: the coarsest time that file systems keep


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
        known = read_note(note)
    except ImageError:
        known = None
    if known is not None and known.get("state") == state and is_digest(str(known.get("digest"))):
        return str(known["digest"])
    digest = files.file_digest(path)
    # A change in the same tick of the clock would not show.
    if time.time() - max(found.st_mtime, found.st_ctime) > _TICK:
        try:
            write_note(note, {"digest": digest, "state": state})
        except (OSError, ImageError):
            pass  # no place to remember it
    return digest
