"""Keys, pins and signatures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from apppot.host.common.errors import RepositoryError, UsageError
from apppot.host.repository import keys
from apppot.host.repository.model import digest_of

INDEX = b'{"an": "index"}\n'
URL = "https://images.example/pots"


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "apppot" / "keys"


def signature(*names: str) -> keys.Signature:
    return keys.read_signature(keys.sign(INDEX, digest_of(INDEX), names))


def test_a_private_key_is_its_owners_alone(own_config: Path) -> None:
    keys.create("mine")
    assert os.stat(own_config / "mine.pem").st_mode & 0o777 == 0o600
    assert os.stat(own_config).st_mode & 0o777 == 0o700
    os.chmod(own_config / "mine.pem", 0o644)
    with pytest.raises(RepositoryError, match="open to others"):
        keys.load("mine")


def test_a_key_is_never_overwritten() -> None:
    first = keys.create()
    with pytest.raises(RepositoryError, match="already"):
        keys.create()
    assert keys.own_keys() == [first]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "ä", "x" * 65])
def test_a_key_name_is_one_plain_word(name: str) -> None:
    with pytest.raises(UsageError):
        keys.create(name)


def test_the_only_key_signs_and_among_several_the_default() -> None:
    with pytest.raises(RepositoryError, match="no key"):
        keys.choose("")
    keys.create("a")
    assert keys.choose("") == "a"
    keys.create("b")
    with pytest.raises(RepositoryError, match="several"):
        keys.choose("")
    keys.create()
    assert keys.choose("") == "default" and keys.choose("a") == "a"


def test_only_a_pinned_key_counts() -> None:
    key = keys.create()
    proof = signature("default")
    with pytest.raises(RepositoryError, match="not trusted") as caught:
        keys.verify(INDEX, proof, keys.trusted_for(URL), URL)
    assert key.public in caught.value.hint
    keys.trust(key.public)
    keys.verify(INDEX, proof, keys.trusted_for(URL), URL)


def test_a_pin_holds_for_its_repository_only() -> None:
    key = keys.create()
    keys.trust(key.public, URL + "/")
    assert keys.trusted_for(URL) == {key.public}
    assert keys.trusted_for(URL + "2") == set()
    keys.untrust(key.public)
    assert keys.trusted_for(URL) == set()
    with pytest.raises(RepositoryError, match="not trusted"):
        keys.untrust(key.public)


def test_pinning_twice_is_once() -> None:
    key = keys.create()
    for _ in range(2):
        keys.trust(key.public, URL)
    assert len(keys.pins()) == 1


def test_a_pub_file_is_a_key_too(own_config: Path) -> None:
    key = keys.create()
    keys.trust(str(own_config / "default.pub"))
    assert keys.pins() == [keys.Pin(key.public)]


@pytest.mark.parametrize("text", ["", "ed25519:", "ed25519:AAAA", "rsa:" + "A" * 44, "\x1b[2J"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a public key"):
        keys.trust(text)


def test_one_changed_byte_is_noticed() -> None:
    keys.trust(keys.create().public)
    with pytest.raises(RepositoryError, match="wrong"):
        keys.verify(INDEX + b" ", signature("default"), keys.trusted_for(URL), URL)


def test_a_foreign_signature_under_a_trusted_name_is_wrong() -> None:
    trusted, other = keys.create("a"), keys.create("b")
    raw = json.loads(keys.sign(INDEX, digest_of(INDEX), ["b"]))
    assert raw["signatures"][0]["key"] == other.public
    raw["signatures"][0]["key"] = trusted.public
    forged = keys.read_signature(json.dumps(raw).encode())
    with pytest.raises(RepositoryError, match="wrong"):
        keys.verify(INDEX, forged, {trusted.public}, URL)


def test_with_several_signatures_one_trusted_is_enough() -> None:
    old, new = keys.create("old"), keys.create("new")
    for key in (old, new):
        keys.verify(INDEX, signature("old", "new"), {key.public}, URL)


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"schema": 1, "index": "../x", "signatures": []}', b"\xff" * 99]
)
def test_a_damaged_signature_file_is_said_so(data: bytes) -> None:
    with pytest.raises(RepositoryError, match="signature file"):
        keys.read_signature(data)


def test_no_signature_at_all() -> None:
    with pytest.raises(RepositoryError, match="not signed"):
        keys.verify(INDEX, keys.Signature(digest_of(INDEX), ()), {"x"}, URL)


@pytest.mark.parametrize("url", ["ftp://a/b", "file:///etc", "http://", "http://a/?q", "a b", ""])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        keys.clean_url(url)


def test_damaged_pins_are_not_no_pins(own_config: Path) -> None:
    keys.trust(keys.create().public)
    (own_config / "trusted.json").write_text("{")
    with pytest.raises(RepositoryError):
        keys.trusted_for(URL)
