"""An image's record, and the words that name images."""

from __future__ import annotations

from dataclasses import field

from apppot.host.common.errors import ImageError
from apppot.host.common.frozen import frozen
from apppot.host.images.probe import ImageFormat, Probed

LATEST = "latest"
DIGEST_PREFIX = "sha256:"
HEX = frozenset("0123456789abcdef")
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")
VERSION_CHARACTERS = NAME_CHARACTERS | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ+~")
MAX_WORD = 128
# The host's root, and what stands before a colon as the kind of a reference.
TRANSPORTS = frozenset({"oci", "docker-archive", "docker"})
RESERVED_NAMES = frozenset({"host"}) | TRANSPORTS


@frozen
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


@frozen
class Image:
    """An image that a guest can mount; `digest` and `record` are None outside the store."""

    path: str
    format: ImageFormat
    digest: str | None
    record: Record | None
    probed: Probed


def is_transport(reference: str) -> bool:
    """Whether `reference` names an image of other tools, like oci:DIR."""
    kind, colon, rest = reference.partition(":")
    return bool(colon and rest) and kind in TRANSPORTS


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


def is_digest(text: str) -> bool:
    """Whether `text` is a whole digest: 64 lower-case hexadecimal digits."""
    return len(text) == 64 and HEX.issuperset(text)


def check_name(name: str, version: str) -> None:
    """Raise ImageError where name or version could not be stored."""
    if not valid_name(name):
        raise ImageError(
            f"{name!r} cannot be an image's name",
            "lower-case letters, digits, '.', '_' and '-', not `host`",
        )
    if not valid_version(version) or version == LATEST:
        raise ImageError(f"{version!r} cannot be an image's version", "for instance 1 or 12.5")


HOST_IMAGE = "host"
