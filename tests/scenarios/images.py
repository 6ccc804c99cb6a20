"""Base images that are not the usual one: what the scenarios must not depend on shows there.

Alpine and RPM distributions offer their roots at places that the tests do not reach.  `musl` is
as near to Alpine as Debian's packages come: its libc and its loader, one shell (ash), no GNU
tools, no Python, no sudo, no account but root.  The tools are BusyBox, linked statically; what is
linked with musl is the program that the scenarios run in front of each command.
"""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from apppot.host.common import paths
from apppot.host.common.errors import ImageError
from apppot.host.images import store
from apppot.host.images.building import builder, recipe
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import user_store
from apppot.host.pot.apt import Apt

from tests.scenarios.runner import PROVEN_SOURCE

PACKAGES = ("busybox-static", "musl", "musl-dev")
LOADER = "lib/ld-musl-x86_64.so.1"
DIRECTORIES = (
    *("bin", "dev", "etc", "home", "lib", "media", "mnt", "opt", "proc", "root", "run", "sbin"),
    *("srv", "sys", "tmp", "usr", "usr/bin", "usr/lib", "usr/sbin", "var", "var/tmp"),
)
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/issue": "Welcome\n",
    "usr/lib/os-release": 'NAME="A small system"\nID=musl\n',
}
LINKS = {"etc/os-release": "../usr/lib/os-release", LOADER: "libc.so"}


@contextmanager
def alone(folder: str = "tests", lock: str = "lock") -> Iterator[Path]:
    """A folder in the cache, that for the tests' downloads; one process at a time per lock."""
    cache = Path(paths.cache_home()) / folder
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield cache


def stored(name: str) -> str:
    """Path of an image of the caller's; "" where there is none of that name."""
    try:
        return resolve(name).path
    except ImageError:
        return ""


def built(wanted: str) -> str:
    """Path of the image that a recipe makes, named or a file, built where there is none yet."""
    with alone():
        made = recipe.load(wanted)
        found = stored(f"{made.name}:{made.version}")
        return found or store.blob_path(user_store(), builder.build(made)[0])


class Musl:
    """A root file system with musl, and a compiler for it, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tree = folder, folder / "tree"
        with alone() as cache:
            files = _packages(cache)
        for file in files:
            subprocess.run(["dpkg-deb", "-x", str(file), str(self.tree)], check=True)

    def image(self) -> str:
        """Path of the image, imported as Alpine's own archive would be."""
        archive = self.folder / "root.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            self._fill(tar)
        program = "from apppot.host.cli import main; main()"
        words = [sys.executable, "-c", program, "image", "import", str(archive), "--name", "musl:1"]
        env = {**os.environ, "XDG_DATA_HOME": str(self.folder)}
        subprocess.run(words, env=env, check=True, capture_output=True)
        (path,) = (self.folder / "apppot" / "images").glob("blobs/*")
        return str(path)

    def _fill(self, tar: tarfile.TarFile) -> None:
        for name in DIRECTORIES:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o1777 if name.endswith("tmp") else 0o755
            tar.addfile(member)
        for name, text in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
        busybox = self.tree / "bin" / "busybox"
        tar.add(busybox, "bin/busybox")
        tar.add(self.tree / "lib" / "x86_64-linux-musl" / "libc.so", "lib/libc.so")
        listed = subprocess.run(
            [busybox, "--list-full"], check=True, capture_output=True, text=True
        )
        applets = set(listed.stdout.split()) - {"bin/busybox"}
        for name, target in {**dict.fromkeys(applets, "/bin/busybox"), **LINKS}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)

    def proven(self) -> Path:
        """proven.c linked with musl: it runs only where musl's loader is."""
        target, library = self.folder / "proven", self.tree / "usr" / "lib" / "x86_64-linux-musl"
        # The package's own rules for the compiler name the places of an installed package.
        specs = (library / "musl-gcc.specs").read_text().replace("/usr/", f"{self.tree}/usr/")
        rules = self.folder / "musl.specs"
        rules.write_text(specs)
        words = ["gcc", "-specs", str(rules), "-O1", "-o", str(target), str(PROVEN_SOURCE)]
        subprocess.run(words, check=True)
        return target


def _packages(cache: Path) -> list[Path]:
    """The files of PACKAGES, out of the cache where they are there."""
    found = [sorted((cache / "debs").glob(f"{name}_*.deb")) for name in PACKAGES]
    if all(found):
        return [files[-1] for files in found]
    apt = Apt(cache, ["bookworm"])
    apt.update()
    return [apt.download(package) for package in apt.packages(PACKAGES)]
