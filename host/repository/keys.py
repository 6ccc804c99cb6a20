"""Keys that sign repositories, and the ones that this user trusts.

    $XDG_CONFIG_HOME/apppot/keys/NAME.pem      a private key (PKCS 8), mode 0600
    $XDG_CONFIG_HOME/apppot/keys/NAME.pub      its public half, one line, to give away
    $XDG_CONFIG_HOME/apppot/keys/trusted.json  public keys pinned by `apppot key trust`

Nothing is ever trusted but by an explicit pin: a key that comes with a repository proves nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import TYPE_CHECKING

from apppot.host.common import paths
from apppot.host.common.errors import RepositoryError, UsageError
from apppot.host.common.files import write_atomic
from apppot.host.common.frozen import frozen
from apppot.host.repository import files

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PREFIX = "ed25519:"
KEY_BYTES = 32
DEFAULT_NAME = "default"
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
# So that a signature over an index is one over nothing else.
CONTEXT = b"apppot repository index, version 1\n"
SIGNATURE_SCHEMA = 1


@frozen
class Pin:
    """A trusted public key; `repository` "" means every repository."""

    key: str
    repository: str = ""


@frozen
class Key:
    """A key pair of this user's: the name of its file and its public half as text."""

    name: str
    public: str


def key_folder() -> str:
    """Where keys and pins are kept."""
    return os.path.join(os.path.dirname(paths.config_files()[-1]), "keys")


def parse_public(text: str) -> str:
    """A public key in its one spelling, from that or from the path of a .pub file.

    Raises UsageError.
    """
    word = text.strip()
    if not word.startswith(PREFIX) and os.path.isfile(text):
        with open(text, encoding="utf-8", errors="replace") as handle:
            word = handle.read(1000).strip()
    try:
        raw = base64.b64decode(word.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if not word.startswith(PREFIX) or len(raw) != KEY_BYTES:
        raise UsageError(
            f"{text[:100]!r} is not a public key", f"it looks like {PREFIX}…=: `apppot key list`"
        )
    return _spell(raw)


def _spell(raw: bytes) -> str:
    return PREFIX + base64.b64encode(raw).decode()


def clean_url(url: str) -> str:
    """A repository's URL without its last slashes.  Raises UsageError for what is none."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
    except ValueError:
        sound = False
    if not sound or parts.query or parts.fragment:
        raise UsageError(f"{url[:200]!r} is not a repository's URL", "http://… or https://…")
    return url.rstrip("/")


# --- own keys ----------------------------------------------------------------------------------


def create(name: str = DEFAULT_NAME) -> Key:
    """Make a key pair.  Raises RepositoryError where that name is taken."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = _private_path(name)
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = _spell(private.public_key().public_bytes_raw())
    with _changing():
        if os.path.lexists(path):
            raise RepositoryError(
                f"there is a key {name!r} already", "give another name, or move its files away"
            )
        write_atomic(path, pem, 0o600)
        write_atomic(path.removesuffix(".pem") + ".pub", public.encode() + b"\n")
    return Key(name, public)


def _changing() -> AbstractContextManager[bool]:
    folder = key_folder()
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return files.locked(os.path.join(folder, ".lock"))


def _private_path(name: str) -> str:
    if not name or len(name) > 64 or not NAME_CHARACTERS.issuperset(name):
        raise UsageError(f"{name!r} cannot be a key's name", "letters, digits, '_' and '-'")
    return os.path.join(key_folder(), f"{name}.pem")


def own_keys() -> list[Key]:
    """This user's key pairs by name."""
    try:
        entries = sorted(os.listdir(key_folder()))
    except OSError:
        return []
    names = [entry.removesuffix(".pem") for entry in entries if entry.endswith(".pem")]
    return [Key(name, _spell(load(name).public_key().public_bytes_raw())) for name in names]


def load(name: str) -> Ed25519PrivateKey:
    """The private key of that name.  Raises RepositoryError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    path = _private_path(name)
    try:
        with open(path, "rb") as handle:
            mode = os.fstat(handle.fileno()).st_mode
            key = load_pem_private_key(handle.read(), None)
    except FileNotFoundError:
        raise RepositoryError(f"there is no key {name!r}", f"apppot key create {name}") from None
    except (OSError, ValueError, TypeError) as error:
        raise RepositoryError(f"key {path} cannot be read: {error}") from None
    if mode & 0o077:
        raise RepositoryError(f"key {path} is open to others", f"chmod 600 {path}")
    if not isinstance(key, Ed25519PrivateKey):
        raise RepositoryError(f"{path} is not an Ed25519 key", f"apppot key create {name}2")
    return key


def choose(name: str) -> str:
    """`name`, or the only key's name where none is given.  Raises RepositoryError."""
    if name:
        return name
    names = [key.name for key in own_keys()]
    if len(names) == 1 or DEFAULT_NAME in names:
        return names[0] if len(names) == 1 else DEFAULT_NAME
    if not names:
        raise RepositoryError("there is no key to sign with", "apppot key create")
    raise RepositoryError("there are several keys to sign with", f"--key {'|'.join(names)}")


# --- trust -------------------------------------------------------------------------------------


def _trust_file() -> str:
    return os.path.join(key_folder(), "trusted.json")


def pins() -> list[Pin]:
    """The pinned keys.  Raises RepositoryError for a damaged file."""
    rows = files.read_state(_trust_file()).get("pins", [])
    try:
        return [Pin(parse_public(row["key"]), row["repository"]) for row in rows]
    except (KeyError, TypeError, UsageError):
        raise RepositoryError(f"{_trust_file()} is damaged", "mend or remove it") from None


def trust(key: str, repository: str = "") -> None:
    """Pin a public key for one repository's URL, or with "" for all of them."""
    wanted = Pin(parse_public(key), clean_url(repository) if repository else "")
    with _changing():
        _write_pins([*(pin for pin in pins() if pin != wanted), wanted])


def untrust(key: str, repository: str = "") -> None:
    """Take back what `trust` pinned; without a repository, all of that key's pins."""
    public = parse_public(key)
    url = clean_url(repository) if repository else ""
    with _changing():
        known = pins()
        kept = [p for p in known if p.key != public or (url and p.repository != url)]
        if kept == known:
            raise RepositoryError("that key is not trusted", "apppot key list")
        _write_pins(kept)


def _write_pins(rows: Iterable[Pin]) -> None:
    files.write_state(_trust_file(), {"pins": [asdict(row) for row in rows]}, 0o600)


def trusted_for(url: str) -> set[str]:
    """The keys whose signature counts at this URL."""
    return {pin.key for pin in pins() if pin.repository in ("", url)}


# --- signatures --------------------------------------------------------------------------------


def sign(index: bytes, digest: str, names: Iterable[str]) -> bytes:
    """The content of a signature file: the index's digest and one signature per key."""
    rows = []
    for name in names:
        key = load(name)
        signature = base64.b64encode(key.sign(CONTEXT + index)).decode()
        rows.append({"key": _spell(key.public_key().public_bytes_raw()), "signature": signature})
    data = {"schema": SIGNATURE_SCHEMA, "index": digest, "signatures": rows}
    return json.dumps(data, indent=1, sort_keys=True).encode() + b"\n"


@frozen
class Signature:
    """A signature file: the digest of the index that it is about, and (key, signature) pairs."""

    index: str
    rows: tuple[tuple[str, bytes], ...]


def read_signature(data: bytes) -> Signature:
    """Parse a signature file; proves nothing yet.  Raises RepositoryError."""
    from apppot.host.images.record import is_digest

    try:
        raw = json.loads(data)
        digest = raw["index"]
        rows = tuple(
            (str(row["key"]), base64.b64decode(row["signature"], validate=True))
            for row in raw["signatures"][:16]
        )
        if raw["schema"] != SIGNATURE_SCHEMA or not isinstance(digest, str):
            raise ValueError
        if not is_digest(digest):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise RepositoryError(
            "the repository's signature file is damaged or of a newer AppPot",
            "ask the publisher, or update this AppPot",
        ) from None
    return Signature(digest, rows)


def verify(index: bytes, signature: Signature, trusted: set[str], where: str) -> None:
    """Raise RepositoryError unless a trusted key signed exactly these bytes."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    known = [(key, proof) for key, proof in signature.rows if key in trusted]
    if not known:
        raise _unknown_key(signature, where)
    for key, proof in known:
        try:
            raw = base64.b64decode(key.removeprefix(PREFIX))
            Ed25519PublicKey.from_public_bytes(raw).verify(proof, CONTEXT + index)
        except InvalidSignature:
            continue
        return
    raise RepositoryError(
        f"the signature of {where} is wrong: its index was changed after it was signed",
        "do not use it; tell the publisher",
    )


def _unknown_key(signature: Signature, where: str) -> RepositoryError:
    named = []
    for key, _ in signature.rows:
        try:
            named.append(parse_public(key) if key.startswith(PREFIX) else "")
        except UsageError:
            continue
    found = next(filter(None, named), "")
    if not found:
        return RepositoryError(f"{where} is not signed", "ask the publisher to sign it")
    return RepositoryError(
        f"{where} is signed by a key that is not trusted",
        f"compare it with what the publisher told you, then: "
        f"apppot key trust {found} --repository {where}",
    )
