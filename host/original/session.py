"""The session that `apppot-start --apppot IMG` has unasked, since the original writes into IMG.

It is called as its image is.  The image stays as it was; what is written is there again at the
next start.
"""

from __future__ import annotations

import hashlib
import os
import re

from apppot.host.images import sessions
from apppot.host.images.probe import ImageFormat
from apppot.host.images.resolve import resolve

_LONGEST = 80
_WRITTEN = (ImageFormat.EXT4, ImageFormat.RAW)


def session_for(reference: str) -> str | None:
    """The session's name for an image; None for one that the original would not write to.

    These are `host`, and a file that the caller cannot write or that nothing could be written
    into.  Raises ImageError where there is no such image.
    """
    if reference == "host":
        return None
    image = resolve(reference)
    if image.record is not None:
        return _free(image.record.name, image.record.name)
    if image.format not in _WRITTEN or not os.access(image.path, os.W_OK):
        return None
    path = os.path.realpath(image.path)
    name = re.sub(r"[^A-Za-z0-9_.+-]", "-", os.path.basename(path)).lstrip(".")[:_LONGEST]
    return _free(name or "image", path)


def _free(name: str, image: str) -> str:
    """`name` unless a session of another image has it; then with digits of this image's own."""
    longer = f"{name}-{hashlib.sha256(os.fsencode(image)).hexdigest()[:8]}"
    for word in (longer, name):
        found = sessions.find(word)
        if found is not None and image in (found.image, found.image.partition(":")[0]):
            return word
    return name if sessions.find(name) is None else longer


def can_keep() -> bool:
    """Whether sessions can be made here."""
    try:
        os.makedirs(sessions.home(), mode=0o700, exist_ok=True)
    except OSError:
        return False
    return os.access(sessions.home(), os.W_OK)
