"""Images of other tools by their own names: oci:DIR[:TAG], docker-archive:FILE[:NAME:TAG],
docker://NAME[:TAG].

Each is imported once: what identifies it is remembered like a build's inputs.  A registry is
asked only when an image is not in the store yet, or by `image import --force`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from apppot.host.common.errors import ImageError, UsageError
from apppot.host.common.frozen import frozen
from apppot.host.common.text import printable
from apppot.host.images import pack, store
from apppot.host.images.importing import importer, merge, oci, tarstream
from apppot.host.images.probe import ImageFormat, probe
from apppot.host.images.record import LATEST, Record, check_name, valid_version
from apppot.host.images.workspace import workspace
from apppot.host.process import run

VERSION = 1  # of the way of importing; part of what is remembered
SKOPEO_HINT = "apt-get install skopeo, or copy the image on another machine: skopeo copy … oci:DIR"
LOOPBACK = re.compile(r"(localhost|127\.[0-9.]+|\[::1\])(:\d+)?/")
SHORT = 12


@frozen
class Reference:
    """A parsed name: its kind, the place (a path, or for a registry the whole name), the tag."""

    kind: str
    place: str
    tag: str = ""


def parse(text: str) -> Reference:
    """Take a name apart.  Raises UsageError for one without a place."""
    kind, _, rest = text.partition(":")
    if kind == "docker":
        if not rest.startswith("//") or not rest[2:] or rest[2:].startswith("-"):
            raise UsageError(f"{text!r} names no image", "docker://NAME[:TAG]")
        return Reference(kind, rest[2:])
    if os.path.exists(rest):
        return Reference(kind, rest)
    place, tag = rest, ""
    while ":" in place and not os.path.exists(place):
        place, _, last = place.rpartition(":")
        tag = f"{last}:{tag}" if tag else last
    if not os.path.exists(place):
        raise ImageError(f"{rest!r} does not exist", f"{kind}:PATH[:TAG]")
    return Reference(kind, place, tag)


def cached(text: str) -> Record:
    """The record of the image that `text` names; imported where the store does not have it."""
    reference = parse(text)
    if reference.kind == "docker":
        known = store.find_build(_key(reference.place))
        return known if known is not None else import_reference(text)
    with opened(reference) as container:
        known = store.find_build(_key(container.digest))
    return known if known is not None else import_reference(text)


def _key(identity: str) -> str:
    return hashlib.sha256(f"container {VERSION} {identity}".encode()).hexdigest()


def import_reference(
    text: str, name: str = "", command: tuple[str, ...] = (), *, force: bool = False
) -> Record:
    """Import the image that `text` names under NAME[:VERSION], by default its own.

    Raises ImageError for what is missing, damaged, or would take another image's name.
    """
    reference = parse(text)
    with importer.explained(text), opened(reference) as container:
        label, version = _label(reference, container, name)
        with workspace() as folder:
            image = os.path.join(folder, "image")
            merge.merge(
                container.layers,
                image,
                f"importing {printable(text)}",
                whiteouts=True,
                directories=[container.workdir] if container.workdir else [],
            )
            record = Record(
                digest="",
                name=label,
                version=version,
                format=ImageFormat.SQUASHFS,
                size=0,
                distribution=pack.distribution(image),
                description=f"imported from {printable(text)} ({container.digest[7:19]})",
                command=command or container.command,
                entrypoint=() if command else container.entrypoint,
                env=container.env,
                workdir=container.workdir,
                user=container.user,
            )
            done = store.add(image, record, move=force)
    if not command:
        for identity in {container.digest, *_identities(reference)}:
            store.remember_import(_key(identity), done)
    return done


def _identities(reference: Reference) -> tuple[str, ...]:
    return (reference.place,) if reference.kind == "docker" else ()


def _label(reference: Reference, container: oci.Container, name: str) -> tuple[str, str]:
    """Name and version: as asked, else the image's own; its digest stands for `latest`."""
    label, _, version = name.partition(":")
    own = reference.place if reference.kind == "docker" else container.tag
    repository, tag = _split_tag(own)
    if not tag and reference.kind == "oci":
        repository, tag = reference.place.rstrip("/"), own
    label = label or importer.default_name(repository or reference.place)
    if not version:
        fits = valid_version(tag) and tag != LATEST
        version = tag if fits else container.digest.partition(":")[2][:SHORT]
    check_name(label, version)
    return label, version


def _split_tag(name: str) -> tuple[str, str]:
    """ "host:5000/a/b:tag@digest" → ("host:5000/a/b", "tag")"""
    plain = name.partition("@")[0]
    repository, colon, tag = plain.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (plain, "")


@contextmanager
def opened(reference: Reference) -> Iterator[oci.Container]:
    """The image's description, its layers readable while the context lasts."""
    if reference.kind == "oci":
        yield oci.read_layout(reference.place, reference.tag)
    elif reference.kind == "docker-archive":
        with _plain(reference.place) as path, oci.docker_archive(path, reference.tag) as container:
            yield container
    else:
        with workspace() as folder:
            layout = os.path.join(folder, "layout")
            fetch(reference.place, layout)
            yield oci.read_layout(layout)


@contextmanager
def _plain(path: str) -> Iterator[str]:
    """The archive without its compression: members are looked up, so it must be a plain file."""
    probed = probe(path)
    if probed.format is not ImageFormat.TAR:
        raise ImageError(f"{path!r} is no tar archive", "docker save -o FILE IMAGE")
    if probed.detail == "plain":
        yield path
        return
    with workspace() as folder:
        plain = os.path.join(folder, "plain.tar")
        blob = tarstream.Blob(path, probed.size, path, whole=False)
        with open(plain, "xb") as out, tarstream.opened(blob) as stream:
            while data := stream.read(tarstream.CHUNK):
                out.write(data)
        yield plain


def fetch(name: str, layout: str) -> None:
    """Copy an image from its registry into a new OCI layout.  Raises ImageError.

    As with docker, a registry on this machine's loopback may do without TLS.
    """
    if shutil.which("skopeo") is None:
        raise ImageError("skopeo is not installed, which fetches from registries", SKOPEO_HINT)
    argv = ["skopeo", "copy", "--quiet"]
    if LOOPBACK.match(name):
        argv.append("--src-tls-verify=false")
    try:
        run.run([*argv, f"docker://{name}", f"oci:{layout}:fetched"], timeout=6 * 3600.0)
    except run.ToolError as error:
        cause = printable(" ".join(error.cause.split()))
        raise ImageError(
            f"docker://{name} cannot be fetched: {cause[-300:]}",
            "is the name right? a private one needs: skopeo login",
        ) from None
