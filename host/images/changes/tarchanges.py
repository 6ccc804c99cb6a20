"""Tar archives as changes over an image: plain ones, and the original AppPot's `.changes.tar.gz`.

What an archive makes of an image only a guest can say, which reads every kind of image: it
extracts the archive over it and writes what became different as a changes file.  Done once for
an archive and an image; the store keeps the result.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from typing import BinaryIO

from apppot.host.common.errors import ImageError
from apppot.host.common.progress import Progress
from apppot.host.common.text import printable
from apppot.host.common.units import timestamp
from apppot.host.images import probe, store
from apppot.host.images.changes import inguest
from apppot.host.images.changes import record as changes
from apppot.host.images.digests import digest_of
from apppot.host.images.importing import importer, tarstream
from apppot.host.images.record import DIGEST_PREFIX, HOST_IMAGE, MAX_WORD, Image, Record
from apppot.host.images.resolve import in_store
from apppot.host.images.workspace import workspace
from apppot.host.process import run

# Part of the key: raise it when the same inputs give another result.
_FORMAT = "changes 2"
# The disk that the guest extracts to is sparse; what it may grow to.
_SCRATCH = "32G"
_IN_GUEST = "/apppot-archive"
_HINT = "is it a whole archive, made over this image?"


def convert(path: str, image: Image | None, over: Sequence[Image]) -> Image:
    """The changes file made of the tar at `path` over `image` (None is `host`) and `over`.

    `over` are changes in between, lowest first.  Raises ImageError.
    """
    lower = [_identity(item) for item in over]
    inputs = (_FORMAT, _state(path), _identity(image), *lower)
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()
    record = store.find_build(key)
    if record is None:
        record = _convert(path, image, over)
        store.remember_build(key, record.digest)
    return in_store(record)


def _state(path: str) -> tuple[str, int, int, int]:
    stat = os.stat(path)
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino


def _identity(image: Image | None) -> object:
    if image is None:
        return "host"
    return image.digest or _state(image.path)


def _convert(path: str, image: Image | None, over: Sequence[Image]) -> Record:
    name = printable(os.path.basename(path))
    with workspace() as folder, Progress(f"reading changes from {name}"):
        _show(path, folder)
        words = ["convert", "image", _IN_GUEST, *([] if image else ["plain"])]
        layers = inguest.Layers(
            _reference(image),
            tuple(item.path for item in over),
            binds=(f"archive:{_IN_GUEST}:ro",),
            scratch=_SCRATCH,
        )
        try:
            inguest.run(words, layers, folder, cwd=folder)
        except ImageError as error:
            cause = error.cause.rpartition("changes: ")[2]  # without warnings before it
            raise ImageError(f"the changes {path!r}: {cause}", error.hint or _HINT) from None
        made = os.path.join(folder, "image")
        base, *between = [_digest(item) for item in (image, *over)]
        label = image.record.name if image and image.record else _reference(image)
        changes.seal(made, changes.Changes(base, label, timestamp(), tuple(between)))
        record = Record(
            digest="",
            name=f"changes-{importer.default_name(path)}"[:MAX_WORD],
            version="1",
            format=probe.ImageFormat.EROFS,
            size=0,
            description=f"changes from {name}",
        )
        return store.add(made, record)


def _show(path: str, folder: str) -> None:
    """Put the archive at `folder`/archive: by a link, for a name without colons."""
    place = os.path.join(folder, "archive")
    if probe.probe(path).detail != "zstd":
        os.symlink(os.path.realpath(path), place)
        return
    # The guest's Python knows no zstd.
    with open(place, "xb") as out:
        _decompress(path, out)


def _decompress(path: str, out: BinaryIO) -> None:
    try:
        with open(path, "rb") as source, tarstream.decompressed(source, "zstd") as plain:
            while data := plain.read(tarstream.CHUNK):
                out.write(data)
    except run.ToolError as error:
        cause = printable(" ".join(error.cause.split()))
        hint = tarstream.TRUNCATED_HINT if shutil.which("zstd") else error.hint
        raise ImageError(f"the changes {path!r}: {cause}", hint) from None


def _reference(image: Image | None) -> str:
    if image is None:
        return HOST_IMAGE
    return f"{DIGEST_PREFIX}{image.digest}" if image.digest else os.path.abspath(image.path)


def _digest(image: Image | None) -> str:
    return HOST_IMAGE if image is None else digest_of(image)
