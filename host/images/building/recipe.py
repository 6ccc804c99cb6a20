"""Recipes: what a base image is made of, as strict TOML.

packages = ["hmmer"]
run = ["ldconfig"]           # steps as root in a virtual machine with network

[base]
suite = "bookworm"           # a Debian suite; mirrors are the machine's own
# parent = "debian-12"       # or, instead of a suite, an image of the store

[image]
name = "hmmer"
version = "1"
command = ["hmmsearch", "-h"]
embed_agent = true           # boots without a pot: init=/sbin/apppot-init

[files]
"/etc/motd" = "Welcome\\n"
"/usr/local/bin/tool" = { source = "tool.sh", mode = "0755" }
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NoReturn

from apppot.host.common.errors import UsageError
from apppot.host.common.frozen import frozen
from apppot.host.common.paths import recipe_homes
from apppot.host.images.record import LATEST, valid_name, valid_version

TOP_KEYS = ("base", "image", "packages", "files", "run")
BASE_KEYS = ("suite", "mirror", "components", "parent")
IMAGE_KEYS = (
    *("name", "version", "description", "command", "user", "env", "workdir"),
    *("source_date_epoch", "embed_agent"),
)
FILE_KEYS = ("content", "source", "mode")
LATER = {
    "size": "image sizes matter for disk images, which come with a later version",
}
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?(=[A-Za-z0-9.+~:-]+)?")
SUITE = re.compile(r"[a-z][a-z0-9.-]*")
MIRROR = re.compile(r"(https?|file|ftp)://\S+|file:/\S+")
MAX_EPOCH = 0xFFFFFFFF
# -I and -S as in the pot: nothing of the image's own Python set-up is read.
AGENT_SHEBANG = "#!/usr/bin/python3 -IS"


@frozen
class RecipeFile:
    """A file that the recipe puts into the image, owned by root."""

    path: str
    content: bytes
    mode: int


@frozen
class Recipe:
    """A parsed recipe.  `epoch` (seconds) is None where the archive's own date is to be used."""

    name: str
    version: str
    suite: str
    mirror: str
    components: tuple[str, ...]
    packages: tuple[str, ...]
    files: tuple[RecipeFile, ...]
    description: str
    command: tuple[str, ...]
    user: str
    env: tuple[tuple[str, str], ...]
    workdir: str
    epoch: int | None
    path: str
    embed_agent: bool = False
    parent: str = ""  # an image of the store, instead of a suite
    run: tuple[str, ...] = ()

    def inputs(self) -> str:
        """All that decides about the result, as text for a digest; not where the file lies."""
        fields = asdict(self)
        del fields["path"]
        for name in ("embed_agent", "parent", "run"):
            if not fields[name]:
                del fields[name]  # recipes from before it keep their key
        return repr(sorted(fields.items()))


class _Reader:
    """Takes values out of one parsed recipe and says precisely what is wrong with them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def fail(self, problem: str, hint: str = "see image-recipes/bases for examples") -> NoReturn:
        raise UsageError(f"recipe {self.path}: {problem}", hint)

    def check_keys(self, table: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> None:
        words = list(known)
        for key in table:
            if key in words:
                continue
            later = LATER.get(prefix + key)
            if later:
                self.fail(f"`{prefix}{key}`: {later}", "remove it, or do the step in a console")
            near = difflib.get_close_matches(key, words, 1)
            meant = f"did you mean `{prefix}{near[0]}`?" if near else f"known: {', '.join(words)}"
            self.fail(f"unknown key `{prefix}{key}`", meant)

    def table(self, data: Mapping[str, Any], key: str) -> dict[str, Any]:
        value = data.get(key, {})
        if not isinstance(value, dict):
            self.fail(f"`{key}` must be a table")
        return value

    def text(self, table: Mapping[str, Any], key: str, default: str = "") -> str:
        value = table.get(key, default)
        if not isinstance(value, str) or "\0" in value:
            self.fail(f"`{key}` must be a string")
        return value

    def texts(self, table: Mapping[str, Any], key: str) -> tuple[str, ...]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.fail(f"`{key}` must be a list of strings")
        return tuple(value)


def parse(text: str, path: str) -> Recipe:
    """The recipe in `text`; `path` is for messages and for files beside it.

    Raises UsageError that names the key, what is wrong with it and what was probably meant.
    """
    reader = _Reader(path)
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reader.fail(str(error))
    reader.check_keys(data, TOP_KEYS)
    base, image = reader.table(data, "base"), reader.table(data, "image")
    reader.check_keys(base, BASE_KEYS, "base.")
    reader.check_keys(image, IMAGE_KEYS, "image.")
    stem = os.path.basename(path).removesuffix(".toml")
    embed = _flag(reader, image, "embed_agent")
    parent = _parent(reader, base)
    files = [*_files(reader, reader.table(data, "files")), *(agent_files() if embed else ())]
    return Recipe(
        name=_name(reader, image, stem),
        version=_version(reader, image),
        suite="" if parent else _suite(reader, base),
        mirror=_mirror(reader, base),
        components=reader.texts(base, "components") or ("main",),
        packages=_packages(reader, data, ("python3",) if embed else ()),
        files=tuple(files),
        description=reader.text(image, "description"),
        command=_command(reader, image),
        user=reader.text(image, "user"),
        env=_env(reader, image),
        workdir=reader.text(image, "workdir"),
        epoch=_epoch(reader, image),
        path=path,
        embed_agent=embed,
        parent=parent,
        run=_run(reader, data),
    )


def agent_files() -> tuple[RecipeFile, ...]:
    """The agent for an image that boots without a pot, run by the image's own Python."""
    from apppot.host.pot.recipes import load_runtime
    from apppot.host.pot.runtime import BUNDLER, INIT, SNAP, read_agent

    texts = read_agent(load_runtime())
    del texts[BUNDLER]
    _, _, script = texts.pop(INIT).partition("\n")
    init = RecipeFile(f"/{INIT}", f"{AGENT_SHEBANG}\n{script}".encode(), 0o755)
    snap = RecipeFile("/usr/bin/apppot-snap", texts.pop(SNAP).encode(), 0o755)
    modules = [RecipeFile(f"/{path}", text.encode(), 0o644) for path, text in texts.items()]
    return (init, snap, *modules)


def _flag(reader: _Reader, table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        reader.fail(f"`image.{key}` must be true or false")
    return value


def _name(reader: _Reader, image: Mapping[str, Any], stem: str) -> str:
    name = reader.text(image, "name", stem)
    if not valid_name(name):
        reader.fail(f"`image.name` {name!r} cannot be a name", "lower-case letters, digits, . _ -")
    return name


def _version(reader: _Reader, image: Mapping[str, Any]) -> str:
    version = reader.text(image, "version", "1")
    if not valid_version(version) or version == LATEST:
        reader.fail(f"`image.version` {version!r} cannot be a version", "for instance 1 or 12.5")
    return version


def _suite(reader: _Reader, base: Mapping[str, Any]) -> str:
    suite = reader.text(base, "suite")
    if not SUITE.fullmatch(suite):
        reader.fail(
            "`base.suite` must name a Debian suite",
            'for instance suite = "bookworm"; or a parent = "debian-12"',
        )
    return suite


def _parent(reader: _Reader, base: Mapping[str, Any]) -> str:
    parent = reader.text(base, "parent")
    if parent and len(base) > 1:
        reader.fail("`base.parent` stands alone: suite and mirror are the parent's own")
    return parent


def _run(reader: _Reader, data: Mapping[str, Any]) -> tuple[str, ...]:
    steps = reader.texts(data, "run")
    if not all(step.strip() for step in steps):
        reader.fail("`run` has an empty step")
    return steps


def _mirror(reader: _Reader, base: Mapping[str, Any]) -> str:
    mirror = reader.text(base, "mirror")
    if mirror and not MIRROR.fullmatch(mirror):
        reader.fail("`base.mirror` must be a URI", "leave it out to use the machine's own mirror")
    return mirror


def _packages(reader: _Reader, data: Mapping[str, Any], more: tuple[str, ...]) -> tuple[str, ...]:
    packages = reader.texts(data, "packages")
    for package in packages:
        if not PACKAGE.fullmatch(package):
            reader.fail(f"{package!r} cannot be a package's name")
    return tuple(sorted({*packages, *more}))


def _command(reader: _Reader, image: Mapping[str, Any]) -> tuple[str, ...]:
    value = image.get("command", [])
    if isinstance(value, str):
        return tuple(shlex.split(value))
    return reader.texts(image, "command")


def _env(reader: _Reader, image: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    table = reader.table(image, "env")
    for key in table:
        if not key or "=" in key:
            reader.fail(f"`image.env` {key!r} cannot be a variable's name")
        reader.text(table, key)
    return tuple(sorted(table.items()))


def _epoch(reader: _Reader, image: Mapping[str, Any]) -> int | None:
    value = image.get("source_date_epoch")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_EPOCH:
        reader.fail("`image.source_date_epoch` must be seconds since 1970")
    return value


def _files(reader: _Reader, table: Mapping[str, Any]) -> Iterable[RecipeFile]:
    for path, value in sorted(table.items()):
        words = path.split("/")
        if not path.startswith("/") or any(word in ("", ".", "..") for word in words[1:]):
            reader.fail(f"`files` {path!r} must be an absolute path without . and ..")
        entry = {"content": value} if isinstance(value, str) else value
        if not isinstance(entry, dict):
            reader.fail(f"`files` {path!r} must be a string or a table")
        reader.check_keys(entry, FILE_KEYS, "files.")
        if ("content" in entry) == ("source" in entry):
            reader.fail(f"`files` {path!r} needs either `content` or `source`")
        yield RecipeFile(path, _content(reader, entry), _mode(reader, entry))


def _content(reader: _Reader, entry: Mapping[str, Any]) -> bytes:
    if "content" in entry:
        return reader.text(entry, "content").encode()
    source = reader.text(entry, "source")
    folder = os.path.realpath(os.path.dirname(reader.path) or ".")
    whole = os.path.realpath(os.path.join(folder, source))
    if os.path.commonpath([folder, whole]) != folder:
        reader.fail(f"file {source!r} lies outside the recipe's folder", "copy it there")
    try:
        with open(whole, "rb") as handle:
            return handle.read()
    except OSError as error:
        reader.fail(f"file {source!r} cannot be read: {error.strerror}")


def _mode(reader: _Reader, entry: Mapping[str, Any]) -> int:
    text = reader.text(entry, "mode", "0644")
    if not re.fullmatch(r"0?[0-7]{3,4}", text):
        reader.fail(f"mode {text!r} must be octal", 'for instance "0755"')
    return int(text, 8)


def find(reference: str) -> str:
    """The path of a recipe given by path, or by name with or without .toml.

    Raises UsageError that lists the recipes there are.
    """
    if "/" in reference or os.path.isfile(reference):
        return reference
    name = reference.removesuffix(".toml") + ".toml"
    for folder in recipe_homes():
        for candidate in (os.path.join(folder, "bases", name), os.path.join(folder, name)):
            if os.path.isfile(candidate):
                return candidate
    there = sorted({entry for folder in recipe_homes() for entry in _recipes_in(folder)})
    near = difflib.get_close_matches(reference, there, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(there) or 'none'}"
    raise UsageError(f"there is no recipe {reference!r}", hint)


def _recipes_in(folder: str) -> list[str]:
    try:
        entries = os.listdir(os.path.join(folder, "bases"))
    except OSError:
        return []
    return [entry.removesuffix(".toml") for entry in entries if entry.endswith(".toml")]


def load(reference: str) -> Recipe:
    """Find, read and parse a recipe; raises UsageError."""
    path = find(reference)
    try:
        with open(path, encoding="utf-8") as handle:
            text = handle.read()
    except (OSError, ValueError) as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from None
    return parse(text, path)
