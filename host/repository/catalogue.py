"""The indexes of repositories as this host knows them: fetched, verified, never going back.

$XDG_DATA_HOME/apppot/repositories.json      highest serial seen of each repository
$XDG_CACHE_HOME/apppot/repositories/<hash>/  per URL: its last signature and index
"""

from __future__ import annotations

import os
import time
from typing import Any

from apppot.host.common import paths
from apppot.host.common.errors import RepositoryError
from apppot.host.common.files import write_atomic
from apppot.host.repository import files, keys
from apppot.host.repository.model import (
    INDEX,
    MAX_INDEX,
    MAX_SIGNATURE,
    SIGNATURE,
    Index,
    blob_path,
    decode_index,
    digest_of,
)
from apppot.host.repository.remote import Unreachable, Web


def fetch(web: Web, url: str) -> Index:
    """The current index at `url`, signed by a key trusted there and no older than seen before.

    Of many processes that ask at once, one does; the others take what it found.  Raises
    RepositoryError.
    """
    folder = _cache(url)
    failure = os.path.join(folder, "failure.json")
    started = time.time()
    with files.locked(os.path.join(folder, "lock")) as waited:
        raw = _cached_signature(folder, started) if waited else None
        if waited and raw is None:
            files.raise_noted(failure, started)
        try:
            return _fetch(web, url, folder, raw)
        except Unreachable as error:
            files.note_failure(failure, error)
            raise


def _fetch(web: Web, url: str, folder: str, known: bytes | None) -> Index:
    """The index that the signature `known` or else the server's is about, verified."""
    raw = known or web.small(f"{url}/{SIGNATURE}", MAX_SIGNATURE)
    signature = keys.read_signature(raw)
    data = _read(os.path.join(folder, "index"))
    if digest_of(data) != signature.index:
        data = _download(web, url, signature.index)
    keys.verify(data, signature, keys.trusted_for(url), url)
    index = decode_index(data)
    _admit(url, index, signature.index)
    if known is None:
        write_atomic(os.path.join(folder, "index"), data)
        write_atomic(os.path.join(folder, "signature"), raw)
    return index


def _cache(url: str) -> str:
    return os.path.join(paths.cache_home(), "repositories", digest_of(url.encode())[:32])


def _cached_signature(folder: str, since: float) -> bytes | None:
    path = os.path.join(folder, "signature")
    try:
        return _read(path) if os.stat(path).st_mtime >= since else None
    except OSError:
        return None


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as handle:
            return handle.read()
    except OSError:
        return b""


def _download(web: Web, url: str, digest: str) -> bytes:
    """The index with that digest: the named copy, or in the middle of a publish its original."""
    for path in (INDEX, blob_path("indexes", digest)):
        data = web.small(f"{url}/{path}", MAX_INDEX)
        if digest_of(data) == digest:
            return data
    raise RepositoryError(
        f"{url}: the index is not the one that was signed", "try another mirror; tell the publisher"
    )


# --- never back --------------------------------------------------------------------------------


def _state() -> str:
    return os.path.join(paths.data_home(), "repositories.json")


def _changing() -> str:
    return os.path.join(paths.data_home(), "repositories.lock")


def _admit(url: str, index: Index, digest: str) -> None:
    """Remember this index as the newest; raise RepositoryError where that is not true."""
    with files.locked(_changing()):
        state = files.read_state(_state())
        serials, urls = _part(state, "serials"), _part(state, "urls")
        if urls.get(url, index.id) != index.id:
            raise RepositoryError(f"{url} is another repository than before", _reset(url))
        known = serials.get(index.id) or {"serial": 0, "index": digest}
        if index.serial < known["serial"]:
            raise RepositoryError(
                f"{url} is older than it was: serial {index.serial} after {known['serial']}",
                f"an outdated mirror, or an attempt to bring back old images; {_reset(url)}",
            )
        if index.serial == known["serial"] and digest != known["index"]:
            raise RepositoryError(
                f"{url} shows two different indexes with serial {index.serial}", _reset(url)
            )
        now = {"serial": index.serial, "index": digest}
        if serials.get(index.id) != now or url not in urls:
            serials[index.id], urls[url] = now, index.id
            files.write_state(_state(), {"serials": serials, "urls": urls})


def _part(state: dict[str, Any], name: str) -> dict[str, Any]:
    part = state.get(name, {})
    if not isinstance(part, dict):
        raise RepositoryError(f"{_state()} is damaged", "mend it")
    return part


def _reset(url: str) -> str:
    return (
        "if its publisher says that it was started anew: "
        f"apppot key trust PUBKEY --repository {url}"
    )


def forget(url: str) -> None:
    """Forget how new the repository at `url` was: it starts anew.  Raises RepositoryError."""
    with files.locked(_changing()):
        state = files.read_state(_state())
        serials, urls = _part(state, "serials"), _part(state, "urls")
        if url in urls:
            serials.pop(str(urls.pop(url)), None)
            files.write_state(_state(), {"serials": serials, "urls": urls})
