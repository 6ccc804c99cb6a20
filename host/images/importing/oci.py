"""Images of container engines: OCI layouts and what `docker save` writes.

Only descriptions are read here; the layers stay where they are, as `Blob`s with the digests
that they must have.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import Any

from apppot.host.common.errors import ImageError
from apppot.host.common.frozen import frozen
from apppot.host.common.text import printable
from apppot.host.images.importing import tarstream
from apppot.host.images.importing.tarstream import Blob

MAX_JSON = 4 << 20
MAX_NESTING = 4
DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "riscv64": "riscv64"}
REFERENCE = "org.opencontainers.image.ref.name"
INDEX = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
HINT = "copy it again with skopeo; is it an image and not another artifact?"


@frozen
class Container:
    """An image of a container engine: its layers, lowest first, and how it wants to be run.

    `digest` identifies it (of the manifest or, from `docker save`, of the configuration).
    """

    layers: tuple[Blob, ...]
    digest: str
    tag: str = ""
    env: dict[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workdir: str = ""
    user: str = ""


# --- OCI layouts -------------------------------------------------------------------------------


def read_layout(folder: str, tag: str = "") -> Container:
    """The image `tag` of the OCI layout in `folder`; without a tag its only one.

    Raises ImageError for what is missing, damaged, ambiguous or for another machine.
    """
    index = _object(_small_file(os.path.join(folder, "index.json")), "index.json")
    chosen = _choose(_list(index, "manifests"), tag, folder)
    descriptor = chosen
    for _ in range(MAX_NESTING):
        data = _read_blob(folder, descriptor)
        manifest = _object(data, _digest(descriptor))
        if descriptor.get("mediaType") not in INDEX and "manifests" not in manifest:
            break
        descriptor = _for_this_machine(_list(manifest, "manifests"), folder)
    else:
        raise ImageError(f"{folder}: its indices are nested too deep", HINT)
    config = _object(_read_blob(folder, manifest.get("config")), "configuration")
    layers = _layout_layers(folder, _list(manifest, "layers"), config)
    return _container(layers, _digest(descriptor), _tag_of(chosen) or tag, config)


def _layout_layers(folder: str, descriptors: Sequence[Any], config: dict[str, Any]) -> list[Blob]:
    contents = _contents(config, len(descriptors))
    blobs = []
    for descriptor, content in zip(descriptors, contents, strict=True):
        digest = _digest(descriptor)
        path = _blob_path(folder, digest)
        name = f"layer {digest[7:19]}"
        try:
            size = os.stat(path).st_size
        except OSError:
            raise ImageError(f"{folder}: {name} is missing", HINT) from None
        blobs.append(Blob(path, size, name, digest=digest, content=content, whole=False))
    return blobs


def _choose(manifests: Sequence[Any], tag: str, folder: str) -> dict[str, Any]:
    objects = [item for item in manifests if isinstance(item, dict)]
    fitting = [item for item in objects if not tag or _tag_of(item) == tag]
    if len(fitting) == 1:
        return fitting[0]
    if fitting and len({_tag_of(item) for item in fitting}) == 1:
        return _for_this_machine(fitting, folder)
    tags = ", ".join(sorted({_tag_of(item) for item in objects} - {""})) or "none with a tag"
    what = f"no image {tag!r}" if tag else f"{len(objects)} images"
    raise ImageError(f"{folder} has {what}: {printable(tags)}", f"oci:{folder}:TAG")


def _for_this_machine(manifests: Sequence[Any], folder: str) -> dict[str, Any]:
    machine = MACHINES.get(platform.machine(), platform.machine())
    wanted = {"os": "linux", "architecture": machine}
    for item in manifests:
        place = item.get("platform") if isinstance(item, dict) else None
        if isinstance(place, dict) and all(place.get(key) == wanted[key] for key in wanted):
            found: dict[str, Any] = item
            return found
    raise ImageError(f"{folder} has no image for linux/{machine}", "get the one for this machine")


def _tag_of(descriptor: dict[str, Any]) -> str:
    notes = descriptor.get("annotations")
    tag = notes.get(REFERENCE) if isinstance(notes, dict) else None
    return tag if isinstance(tag, str) else ""


def _digest(descriptor: Any) -> str:
    digest = descriptor.get("digest") if isinstance(descriptor, dict) else None
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise ImageError("the image names a blob without a digest that AppPot knows", HINT)
    return digest


def _blob_path(folder: str, digest: str) -> str:
    kind, _, hexadecimal = digest.partition(":")
    return os.path.join(folder, "blobs", kind, hexadecimal)


def _read_blob(folder: str, descriptor: Any) -> bytes:
    digest = _digest(descriptor)
    data = _small_file(_blob_path(folder, digest))
    kind, _, wanted = digest.partition(":")
    if hashlib.new(kind, data).hexdigest() != wanted:
        raise ImageError(f"{folder}: blob {digest[:19]} is damaged", tarstream.TRUNCATED_HINT)
    return data


def _small_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON + 1)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}", HINT) from None
    if len(data) > MAX_JSON:
        raise ImageError(f"{path} is too long for a description", HINT)
    return data


# --- docker save -------------------------------------------------------------------------------


@contextmanager
def docker_archive(path: str, reference: str = "") -> Iterator[Container]:
    """The image of an uncompressed `docker save` archive: by name, or its only one.

    Raises ImageError.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            yield _read_archive(archive, path, reference)
    except (tarfile.TarError, ValueError) as error:
        raise ImageError(f"{path} is damaged: {error}", tarstream.DAMAGED_HINT) from None


def _read_archive(archive: tarfile.TarFile, path: str, reference: str) -> Container:
    entries = json.loads(_member(archive, "manifest.json", path))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ImageError(f"{path}: manifest.json is no list of images", HINT)
    entry = _choose_entry(entries, reference, path)
    name = entry.get("Config")
    data = _member(archive, name if isinstance(name, str) else "", path)
    digest = hashlib.sha256(data).hexdigest()
    hexadecimal = os.path.basename(str(name)).removesuffix(".json")
    if re.fullmatch(r"[0-9a-f]{64}", hexadecimal) and hexadecimal != digest:
        raise ImageError(f"{path}: its configuration is damaged", tarstream.TRUNCATED_HINT)
    config = _object(data, "configuration")
    names = _list(entry, "Layers")
    contents = _contents(config, len(names))
    pairs = zip(names, contents, strict=True)
    layers = [_archived(archive, path, str(layer), content) for layer, content in pairs]
    return _container(layers, f"sha256:{digest}", _first_tag(entry), config)


def _choose_entry(entries: list[dict[str, Any]], reference: str, path: str) -> dict[str, Any]:
    fitting = [entry for entry in entries if not reference or reference in _tags(entry)]
    if len(fitting) == 1:
        return fitting[0]
    tags = ", ".join(tag for entry in entries for tag in _tags(entry))
    what = f"no image {reference!r}" if reference else f"{len(entries)} images"
    shown = printable(tags)
    raise ImageError(f"{path} has {what}: {shown}", f"docker-archive:{path}:NAME:TAG")


def _tags(entry: dict[str, Any]) -> list[str]:
    tags = entry.get("RepoTags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _first_tag(entry: dict[str, Any]) -> str:
    tags = _tags(entry)
    return tags[0] if tags else ""


def _find(archive: tarfile.TarFile, name: str, path: str) -> tarfile.TarInfo:
    """A member that holds data; links within the archive stand for layers that are shared."""
    for _ in range(MAX_NESTING):
        try:
            member = archive.getmember(name)
        except KeyError:
            raise ImageError(f"{path} has no {name!r}", "is it what `docker save` wrote?") from None
        if member.isreg() and getattr(member, "sparse", None) is None:
            return member
        target = member.linkname
        name = target if member.islnk() else os.path.join(os.path.dirname(name), target)
        name = os.path.normpath(name)
    raise ImageError(f"{path}: {name!r} is no file", HINT)


def _member(archive: tarfile.TarFile, name: str, path: str) -> bytes:
    member = _find(archive, name, path)
    if member.size > MAX_JSON:
        raise ImageError(f"{path}: {name!r} is too long for a description", HINT)
    stream = archive.extractfile(member)
    assert stream is not None
    return stream.read()


def _archived(archive: tarfile.TarFile, path: str, name: str, content: str | None) -> Blob:
    member = _find(archive, name, path)
    label = f"layer {name[:40]}"
    return Blob(path, member.size, label, member.offset_data, content=content, whole=False)


# --- what both have ----------------------------------------------------------------------------


def _object(data: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise ImageError(f"{name} is no JSON", HINT) from None
    if not isinstance(value, dict):
        raise ImageError(f"{name} is no JSON object", HINT)
    return value


def _list(table: dict[str, Any], key: str) -> list[Any]:
    value = table.get(key)
    if not isinstance(value, list):
        raise ImageError(f"the image's description has no {key}", HINT)
    return value


def _contents(config: dict[str, Any], count: int) -> list[str | None]:
    """The digests of the layers' plain contents, None where the configuration has none."""
    rootfs = config.get("rootfs")
    found = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(found, list) or not found:
        return [None] * count
    if len(found) != count or not all(isinstance(d, str) and DIGEST.fullmatch(d) for d in found):
        raise ImageError("the image's configuration does not fit its layers", HINT)
    return found


def _container(layers: Sequence[Blob], digest: str, tag: str, config: dict[str, Any]) -> Container:
    inner = config.get("config")
    wishes: dict[str, Any] = inner if isinstance(inner, dict) else {}
    workdir = _text(wishes, "WorkingDir")
    return Container(
        layers=tuple(layers),
        digest=digest,
        tag=tag,
        env=_environment(_texts(wishes, "Env")),
        entrypoint=_texts(wishes, "Entrypoint"),
        command=_texts(wishes, "Cmd"),
        # "/" is what engines write where nobody said anything.
        workdir="" if workdir.strip("/") == "" else "/" + workdir.strip("/"),
        user=_text(wishes, "User"),
    )


def _texts(table: dict[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key) or []
    if not isinstance(value, list) or not all(isinstance(v, str) and "\0" not in v for v in value):
        raise ImageError(f"the image's {key} is no list of strings", HINT)
    return tuple(value)


def _text(table: dict[str, Any], key: str) -> str:
    value = table.get(key) or ""
    if not isinstance(value, str) or "\0" in value:
        raise ImageError(f"the image's {key} is no string", HINT)
    return value


def _environment(lines: Sequence[str]) -> dict[str, str]:
    pairs = (line.partition("=") for line in lines)
    return {name: value for name, equals, value in pairs if name and equals}
