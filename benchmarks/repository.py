"""Pulling an image: against curl on a line of 1 Gbit/s, and after one package's update."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from apppot.host.images.resolve import resolve
from apppot.host.process.run import run

from benchmarks import trees
from benchmarks.machines import APPPOT, HERE, IMAGE, Bench
from benchmarks.measure import BenchmarkError, Row, interleaved, launch, row

# From the goals: at least 80 % of what curl reaches; an update for at most 15 % of the image.
LONGER, UPDATE = 1 / 0.8, 15.0
RATE = "1gbit"
SERVER, CLIENT = "10.199.0.1", "10.199.0.2"
PACKAGES = ("libssl3", "openssl")
MB = 1_000_000


@dataclass(frozen=True)
class Account:
    """Somebody with a store and keys of his own below `home`."""

    home: Path

    @property
    def env(self) -> dict[str, str]:
        """The environment of his commands: nothing of this user's, and no proxy."""
        kept = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
        own = {f"XDG_{name}_HOME": str(self.home / name.lower()) for name in ("DATA", "CACHE")}
        own |= {"XDG_CONFIG_HOME": str(self.home / "config")}
        return {**kept, **own, "APPPOT_SITE_STORE": str(self.home / "none")}

    def apppot(self, *words: object, inside: tuple[str, ...] = ()) -> bytes:
        """Run a command of his; what it printed."""
        argv = [*inside, APPPOT, *(str(word) for word in words)]
        return launch(argv, env=self.env).output

    def forget(self) -> None:
        """Lose images and caches, keep the trusted keys."""
        for name in ("data", "cache"):
            shutil.rmtree(self.home / name, ignore_errors=True)


def accounts(folder: Path) -> tuple[Account, Account]:
    """A publisher with a key, and a user who trusts it."""
    publisher, user = Account(folder / "publisher"), Account(folder / "user")
    publisher.apppot("key", "create")
    listed = publisher.apppot("key", "list").decode()
    key = next(word for word in listed.split() if word.startswith("ed25519:"))
    user.apppot("key", "trust", key)
    return publisher, user


# -- a line of 1 Gbit/s -------------------------------------------------------------------------


def pull(given: Bench) -> list[Row]:
    """Rows about `apppot pull` beside curl of one file, from one server, in turns."""
    folder = given.folder / "pull"
    folder.mkdir()
    image, repository = folder / "big.squashfs", folder / "repository"
    trees.mixed(folder / "tree", 750 * MB, 7)
    options = ("-quiet", "-no-progress", "-comp", "lz4")
    run(["mksquashfs", folder / "tree", image, *options], hint="apt-get install squashfs-tools")
    shutil.rmtree(folder / "tree")
    publisher, user = accounts(folder)
    publisher.apppot("image", "import", image, "--name", "big")
    publisher.apppot("publish", repository, "big")
    os.rename(image, repository / "whole")
    size = (repository / "whole").stat().st_size / MB
    with shaped(repository) as (url, inside):
        curl = [*inside, "curl", "-sS", "-o", str(folder / "out"), f"{url}/whole"]
        subjects = {
            "curl": lambda: {"s": launch(curl, env=user.env).seconds},
            "pull": lambda: pulling(user, f"{url}/big", inside),
        }
        found = interleaved(subjects, given.rounds(1, 7))
    times, base = found["pull"]["s"], found["curl"]["s"]
    longer = [mine / other for mine, other in zip(times, base, strict=True)]
    case = f"{size:.0f} MB at {RATE}"
    return [
        row("pull", f"{case}: curl", [size / s for s in base], "MB/s"),
        row("pull", f"{case}: apppot pull", [size / s for s in times], "MB/s"),
        row("pull", f"{case}: pull's time against curl's", longer, "×", budget=LONGER),
    ]


def pulling(user: Account, reference: str, inside: tuple[str, ...]) -> Mapping[str, float]:
    """Seconds of one pull into an empty store."""
    user.forget()
    return {"s": launch([*inside, APPPOT, "pull", reference], env=user.env).seconds}


@contextmanager
def shaped(folder: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """A server of `folder` behind a line of RATE in network namespaces of their own.

    Yields its URL, and the words that run a command at the other end of the line.
    """
    root = os.geteuid() == 0
    apart = ("unshare", *(() if root else ("--user", "--map-root-user")), "--net")
    join = ("nsenter", *(() if root else ("--user", "--preserve-credentials")), "--net")
    with ExitStack() as stack:
        ready = ("sh", "-c", "echo ready; exec sleep infinity")
        client, _ = stack.enter_context(serving(*apart, *ready))
        here = (*join, "--target", str(client))
        program = (sys.executable, str(HERE / "webserver.py"), str(folder))
        server, port = stack.enter_context(serving(*here, "unshare", "--net", *program))
        there = (*join, "--target", str(server))
        run([*here, "ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire",
             "netns", str(server)], hint="apt-get install iproute2")  # fmt: skip
        for end, address in ((here, CLIENT), (there, SERVER)):
            run([*end, "ip", "address", "add", f"{address}/24", "dev", "wire"])
            run([*end, "ip", "link", "set", "wire", "up"])
            shape = ["rate", RATE, "burst", "128kb", "latency", "20ms"]
            run([*end, "tc", "qdisc", "add", "dev", "wire", "root", "tbf", *shape])
        yield f"http://{SERVER}:{port}", here


@contextmanager
def serving(*argv: str) -> Iterator[tuple[int, str]]:
    """A process that prints a line when it is ready: its id and that line."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline().strip()
            if not line:
                raise BenchmarkError(f"{' '.join(argv[:6])} … ended at once")
            yield process.pid, line
        finally:
            process.kill()


# -- one package's update -----------------------------------------------------------------------


def update(given: Bench) -> list[Row]:
    """Rows about pulling IMAGE where the same image with an older OpenSSL is in the store."""
    folder = given.folder / "update"
    folder.mkdir()
    new, old = folder / "new.tar", folder / "old.tar"
    with open(new, "wb") as out:
        argv = ["sqfs2tar", resolve(IMAGE).path]
        run(argv, stdout=out.fileno(), hint="apt-get install squashfs-tools-ng")
    versions = replace_packages(new, old, folder)
    publisher, user = accounts(folder)
    repository = folder / "repository"
    for number, path in enumerate((old, new), 1):
        publisher.apppot("image", "import", path, "--name", f"base:{number}")
    publisher.apppot("publish", repository, "base:1", "base:2")
    with serving(sys.executable, str(HERE / "webserver.py"), str(repository)) as (_, port):
        url = f"http://127.0.0.1:{port}"
        first, second = (
            json.loads(user.apppot("pull", f"{url}/base:{number}", "--json")) for number in (1, 2)
        )
    parts = [100 * done["fetched"] / done["size"] for done in (first, second)]
    title = f"{', '.join(PACKAGES)} {versions}"
    return [
        row("update", "image", [second["size"] / MB], "MB"),
        row("update", "first pull: part of the image that is fetched", [parts[0]], "%"),
        row("update", title, [second["fetched"] / MB], "MB"),
        row("update", f"{title}: part of the image", [parts[1]], "%", budget=UPDATE),
    ]


def replace_packages(new: Path, old: Path, folder: Path) -> str:
    """Write the root file system `new` to `old` with PACKAGES of another version.

    Returns the two versions.
    """
    with tarfile.open(new) as source:
        members = {member.name: member for member in source}
        status = _content(source, members["var/lib/dpkg/status"])
        now = _version(status, PACKAGES[0])
        other = _other_version(now)
        parts = _download(other, folder)
        with tarfile.open(old, "w") as target:
            for name, member in members.items():
                data = parts.pop(name, None)
                if name == "var/lib/dpkg/status":
                    _write(target, member, status.replace(now.encode(), other.encode()))
                elif data is not None:
                    _write(target, *data)
                else:
                    target.addfile(member, source.extractfile(member) if member.isreg() else None)
            for data in parts.values():  # what only the other version has
                _write(target, *data)
    return f"{other} → {now}"


def _content(source: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = source.extractfile(member)
    return b"" if file is None else file.read()


def _write(target: tarfile.TarFile, member: tarfile.TarInfo, data: bytes) -> None:
    member.size = len(data)
    target.addfile(member, io.BytesIO(data))


def _version(status: bytes, package: str) -> str:
    found = re.search(rf"^Package: {package}\n(?:.+\n)*?Version: (\S+)", status.decode(), re.M)
    if found is None:
        raise BenchmarkError(f"{IMAGE} has no package {package}")
    return found[1]


def _other_version(now: str) -> str:
    lines = run(["apt-cache", "madison", PACKAGES[0]]).stdout.decode().splitlines()
    others = [v for v in (line.split("|")[1].strip() for line in lines if "|" in line) if v != now]
    if not others:
        raise BenchmarkError(f"apt knows no version of {PACKAGES[0]} beside {now}")
    return others[0]


def _download(version: str, folder: Path) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """The files of PACKAGES at `version`, by their path in an image."""
    run(["apt-get", "download", *(f"{name}={version}" for name in PACKAGES)], cwd=folder)
    found = {}
    for package in folder.glob("*.deb"):
        archive = package.with_suffix(".tar")
        with open(archive, "wb") as out:
            run(["dpkg-deb", "--fsys-tarfile", package], stdout=out.fileno())
        with tarfile.open(archive) as source:
            for member in source:
                member.name = os.path.normpath(member.name)
                if member.isreg() and not member.name.startswith("usr/share/doc/"):
                    found[member.name] = (member, _content(source, member))
    return found
