"""Commit: a base image with changes, or with a session, becomes a base image of its own."""

from __future__ import annotations

import os

from apppot.host.common.errors import UsageError
from apppot.host.common.progress import Progress
from apppot.host.images import sessions, store
from apppot.host.images.changes import inguest
from apppot.host.images.changes.session import image_of
from apppot.host.images.digests import digest_of
from apppot.host.images.probe import ImageFormat
from apppot.host.images.record import Image, Record, check_name
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import workspace


def of_session(name: str) -> inguest.Layers:
    """The layers of the session `name`.  Raises SessionError where there is none."""
    session = sessions.get(name)
    return inguest.Layers(image_of(session), session.changes, session.name)


def commit(
    layers: inguest.Layers, name: str, description: str = "", *, force: bool = False
) -> Record:
    """Put `layers` into the user's store as the image `name` (NAME[:VERSION]).

    How it runs (command, environment, …) is as with the base.  Equal layers give an equal digest.
    Raises ImageError and SessionError; the store has the whole image or none of it.
    """
    label, _, version = name.partition(":")
    check_name(label, version or "1")
    if not layers.changes and not layers.session:
        raise UsageError(
            "there is nothing to commit over the base", "--changes FILE, or --session NAME"
        )
    base = _base(layers.image)
    with workspace() as folder, Progress(f"committing {name}"):
        words = ["commit", "image", *(["session"] if layers.session else [])]
        inguest.run(words, layers, folder)
        record = _record(base, label, version or "1", description)
        return store.add(os.path.join(folder, "image"), record, move=force)


def _base(reference: str) -> Image:
    if reference == "host":
        raise UsageError(
            "this host's own root cannot be committed: much of it cannot be read",
            "`apppot changes save` keeps what was changed over it",
        )
    return resolve(reference)


def _record(base: Image, name: str, version: str, description: str) -> Record:
    """The new image's record: what it says of running is its base's."""
    known = base.record or Record("", name, version, ImageFormat.EROFS, 0)
    return Record(
        digest="",
        name=name,
        version=version,
        format=ImageFormat.EROFS,
        size=0,
        distribution=known.distribution,
        description=description or known.description,
        parent=digest_of(base),
        command=known.command,
        entrypoint=known.entrypoint,
        env=known.env,
        workdir=known.workdir,
        user=known.user,
    )
