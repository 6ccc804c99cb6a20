"""Images and changes that a session stands on."""

from __future__ import annotations

from apppot.host.images.sessions import Session


def image_of(session: Session) -> str:
    """What names its image: the name that it began with, or the digest where that moved on."""
    from apppot.host.images.resolve import find

    digest = session.base.partition("+")[0]
    named = find(session.image)
    if named is not None and named[1].digest != digest and find(digest) is not None:
        return digest
    return session.image
