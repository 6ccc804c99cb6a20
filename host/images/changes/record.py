"""A changes file: an EROFS image of what differs from a base, with a record behind it.

The file system knows its own length, so that a record of the base can stand behind it: JSON, its
length and a mark.  A kernel mounts the file as it is.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import asdict

from apppot.host.common.errors import ImageError
from apppot.host.common.frozen import frozen

_MARK = b"APPPOT-CHANGES\x00\x01"
_TAIL = struct.Struct("<I16s")
_MOST = 1 << 20


@frozen
class Changes:
    """What a changes file says of itself.

    `base` is the digest of the image it belongs to, `image` that image's name when it was saved;
    `over` are the digests of changes that lie between the two, lowest first.
    """

    base: str
    image: str
    created: str
    over: tuple[str, ...] = ()


def seal(path: str, record: Changes) -> None:
    """Put the record behind the file system in `path`."""
    text = json.dumps({"version": 1, **asdict(record)}).encode()
    with open(path, "ab") as file:
        file.write(text + _TAIL.pack(len(text), _MARK))
        file.flush()
        os.fsync(file.fileno())


def read(path: str) -> Changes | None:
    """The record of a changes file; None for a file that has none.  Raises ImageError."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < _TAIL.size:
            return None
        file.seek(size - _TAIL.size)
        length, mark = _TAIL.unpack(file.read(_TAIL.size))
        if mark != _MARK:
            return None
        try:
            if length > min(_MOST, size - _TAIL.size):
                raise ValueError("its length is impossible")
            file.seek(size - _TAIL.size - length)
            return _parse(file.read(length))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ImageError(f"the record of the changes {path!r} is damaged: {error}") from None


def _parse(text: bytes) -> Changes:
    """The record in `text`, which may be a stranger's."""
    value = json.loads(text)
    if value.pop("version") != 1:
        raise ValueError("another version of AppPot made it")
    over = value.pop("over")
    if not isinstance(over, list) or not all(isinstance(w, str) for w in [*value.values(), *over]):
        raise ValueError("it has something else where a text belongs")
    return Changes(**value, over=tuple(over))


def check_base(path: str, record: Changes, digest: str, name: str) -> None:
    """Raise ImageError where the changes belong to another base than `digest`."""
    if record.base != digest:
        from apppot.host.common.text import printable

        image, base = printable(record.image), printable(record.base[:12])
        raise ImageError(
            f"the changes {path!r} belong to the image {image} ({base}), "
            f"not to {name} ({digest[:12]})",
            f"name that image; where it is missing here: apppot pull {image}",
        )
