"""Packages from the machine's own Debian mirror, without root and without touching its state.

A private apt configuration (own lists, cache and source) in a folder of ours: apt checks
signatures and digests as for the system.  The mirror is the one that the machine uses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from apppot.host.common import unfinished
from apppot.host.common.errors import BuildError
from apppot.host.common.files import file_digest
from apppot.host.common.frozen import frozen
from apppot.host.process.run import run

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
APT_HINT = "AppPot builds on Debian or a derivative; elsewhere use `apppot pot import FILE.tar`"
MIRROR_HINT = "name a Debian mirror with APPPOT_DEBIAN_MIRROR=URI"


@frozen
class Package:
    """One downloadable package, as the archive's signed list names it."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The name under which it is kept; a digest in it makes a stale file impossible."""
        return f"{self.name}_{self.sha256[:16]}.deb"


@frozen
class Target:
    """One suite that the machine takes packages from."""

    site: str
    suite: str


def parse_targets(text: str) -> list[Target]:
    """`apt-get indextargets` lines of "SITE SUITE LABEL" that are Debian's own archive."""
    targets = []
    for line in text.splitlines():
        site, suite, origin = (*line.split("\t"), "", "", "")[:3]
        if origin == "Debian" and urlsplit(site).scheme in ("http", "https", "file", "copy"):
            targets.append(Target(site.rstrip("/"), suite))
    return targets


def machine_targets() -> list[Target]:
    """Debian suites in the machine's apt configuration."""
    done = run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(SITE)\t$(RELEASE)\t$(ORIGIN)",
            "Created-By: Packages",
        ],
        check=False,
        timeout=60,
        hint=APT_HINT,
    )
    return parse_targets(done.stdout.decode(errors="replace"))


def archive_mirror(targets: Sequence[Target], override: str | None = None) -> str:
    """The mirror of Debian's main archive (not of its security archive).

    Raises BuildError where the machine names none.
    """
    if override:
        return override.rstrip("/")
    main = [target.site for target in targets if not target.suite.endswith("-security")]
    if not main:
        raise BuildError("the machine's apt configuration names no Debian mirror", MIRROR_HINT)
    return main[0]


def sources(targets: Sequence[Target], mirror: str, suites: Sequence[str]) -> str:
    """A deb822 source with the suites, each from the site the machine itself takes it from."""
    stanzas = []
    for suite in suites:
        own = [target.site for target in targets if target.suite == suite]
        site = own[0] if own else _site_of(suite, mirror)
        stanzas.append(
            f"Types: deb\nURIs: {site}\nSuites: {suite}\nComponents: main\n"
            f"Architectures: amd64\nSigned-By: {KEYRING}\n"
        )
    return "\n".join(stanzas)


def _site_of(suite: str, mirror: str) -> str:
    """Where a mirror keeps a suite: the security archive lies beside the main one."""
    if not suite.endswith("-security"):
        return mirror
    return f"{mirror.removesuffix('/debian')}/debian-security"


class Apt:
    """A private apt in `folder` that sees only `suites`.

    `packages` and `download` raise ToolError or BuildError with what apt said.
    """

    def __init__(self, folder: Path, suites: Sequence[str]) -> None:
        self.folder = folder
        self.suites = tuple(suites)

    def update(self) -> None:
        """Fetch and verify the package lists."""
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        targets = machine_targets()
        mirror = archive_mirror(targets, os.environ.get("APPPOT_DEBIAN_MIRROR"))
        (self.folder / "apt.sources").write_text(sources(targets, mirror, self.suites))
        (self.folder / "status").touch()
        (self.folder / "apt.conf").write_text(self._configuration())
        if not os.access(KEYRING, os.R_OK):
            raise BuildError(f"{KEYRING} is missing", "apt-get install debian-archive-keyring")
        self._apt("-o", "APT::Update::Error-Mode=any", "update")

    def _configuration(self) -> str:
        folder = self.folder
        # The machine's proxy and certificate settings still count; its sources and lists do not.
        return (
            f'Dir::State::lists "{folder}/lists";\n'
            f'Dir::State::status "{folder}/status";\n'
            f'Dir::Cache "{folder}/cache";\n'
            f'Dir::Etc::sourcelist "{folder}/apt.sources";\n'
            'Dir::Etc::sourceparts "-";\n'
            'Dir::Etc::preferences "-";\nDir::Etc::preferencesparts "-";\n'
            'APT::Architecture "amd64";\nAPT::Architectures "amd64";\n'
            'APT::Sandbox::User "";\nAcquire::Languages "none";\nAcquire::Retries "3";\n'
        )

    def _apt(self, *words: str) -> str:
        env = {**os.environ, "APT_CONFIG": f"{self.folder}/apt.conf", "LC_ALL": "C.UTF-8"}
        tool = "apt-cache" if words[0] in ("pkgnames", "show") else "apt-get"
        hint = "is the Debian mirror reachable from here?"
        return run([tool, *words], env=env, timeout=1800, hint=hint).stdout.decode()

    def names(self, prefix: str) -> list[str]:
        """Packages whose name starts with the prefix."""
        return sorted(self._apt("pkgnames", prefix).split())

    def packages(self, names: Iterable[str]) -> list[Package]:
        """The newest version of each package; raises BuildError where one is not offered."""
        wanted = list(names)
        text = self._apt("show", "--no-all-versions", *wanted)
        found = {package.name: package for package in parse_packages(text)}
        missing = [name for name in wanted if name not in found]
        if missing:
            raise BuildError(f"the archive does not offer {', '.join(missing)}")
        return [found[name] for name in wanted]

    def download(self, package: Package) -> Path:
        """The package's file, fetched and verified unless it is here already."""
        target = self.folder / "debs" / package.file_name
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.sweep(str(target.parent), package.file_name)
        with unfinished.making(str(target.parent), package.file_name) as place:
            work = Path(place)
            work.mkdir()
            env = {**os.environ, "APT_CONFIG": f"{self.folder}/apt.conf"}
            version = f"{package.name}={package.version}"
            run(["apt-get", "-q", "download", version], cwd=work, env=env, timeout=3600)
            (file,) = work.glob("*.deb")
            check_digest(file, package.sha256)
            os.replace(file, target)
        return target


def check_digest(file: Path, sha256: str) -> None:
    """Raise BuildError unless the file has this digest."""
    if file_digest(file) != sha256:
        raise BuildError(f"{file.name} has another digest than the archive's list says")


def parse_packages(text: str) -> list[Package]:
    """`apt-cache show` paragraphs; what has no digest cannot be trusted and is left out."""
    packages = []
    for paragraph in re.split(r"\n\n+", text.strip()):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): (.*)$", paragraph, re.MULTILINE))
        if {"Package", "Version", "SHA256"} <= fields.keys():
            packages.append(Package(fields["Package"], fields["Version"], fields["SHA256"]))
    return packages
