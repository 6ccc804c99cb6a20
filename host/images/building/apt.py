"""The machine's own apt configuration: mirrors, proxy, and the state of a package archive."""

from __future__ import annotations

import email.utils
import hashlib
import os
import re
from collections.abc import Iterable

from apppot.host.common.errors import BuildError
from apppot.host.common.frozen import frozen
from apppot.host.process import run

KEYRINGS = (
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
)
TARGET_FORMAT = "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)"
# How to reach a mirror, and what dates to believe; nothing that weakens signature checks.
PASSED_ON = re.compile(
    r'Acquire::((http|https|ftp)::(?!Changelogs)|Check-Valid-Until |Check-Date |Retries )[^"]*"'
)
UPDATE_HINT = "apt-get update; or name a `mirror` in the recipe's [base]"


@frozen
class AptSource:
    """One archive that packages come from."""

    uri: str
    release: str
    components: tuple[str, ...]

    def line(self, keyring: str) -> str:
        """The entry for sources.list, signed by `keyring`."""
        signed = f"[signed-by={keyring}] " if keyring else ""
        return f"deb {signed}{self.uri} {self.release} {' '.join(self.components)}"


@frozen
class ArchiveState:
    """What an archive holds now: a digest over its signed indices and their newest date."""

    digest: str
    epoch: int


def parse_targets(
    text: str, codename: str, suite: str, components: Iterable[str]
) -> list[AptSource]:
    """Sources for `suite` from `apt-get indextargets` lines of a machine that runs `codename`.

    A machine of another release than the recipe's has the same mirrors under other names:
    bookworm-updates stands for trixie-updates.
    """
    wanted = tuple(components)
    releases: dict[tuple[str, str], None] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) < 4 or words[3] != "Debian":
            continue
        uri, release, component = words[:3]
        base, dash, pocket = release.partition("-")
        if base not in (codename, suite) or component not in wanted or "backports" in pocket:
            continue
        releases.setdefault((uri, f"{suite}{dash}{pocket}"))
    return [AptSource(uri, release, wanted) for uri, release in releases]


def codename() -> str:
    """The machine's release name, "" where os-release has none."""
    try:
        with open("/etc/os-release", encoding="utf-8") as handle:
            match = re.search(r'^VERSION_CODENAME="?([\w.-]+)', handle.read(), re.MULTILINE)
    except OSError:
        return ""
    return match[1] if match else ""


def sources(suite: str, mirror: str, components: tuple[str, ...]) -> list[AptSource]:
    """Where packages of `suite` come from: `mirror`, or else the machine's own apt sources.

    Raises BuildError where neither is there.
    """
    if mirror:
        return [AptSource(mirror, suite, components)]
    argv = ["apt-get", "indextargets", "--format", TARGET_FORMAT, "Created-By: Packages"]
    done = run.run(argv, hint="building needs apt, and mmdebstrap: use a Debian machine")
    found = parse_targets(done.stdout.decode(errors="replace"), codename(), suite, components)
    if not found:
        raise BuildError(f"this machine's apt knows no Debian mirror for {suite}", UPDATE_HINT)
    return found


def keyring() -> str:
    """The Debian archive's keyring; it lies at the same place in the image."""
    for path in KEYRINGS:
        if os.path.exists(path):
            return path
    raise BuildError(
        "the Debian archive's keys are missing", "apt-get install debian-archive-keyring"
    )


def passed_on(dump: str) -> list[str]:
    """The lines of `apt-config dump` that a build needs to reach the mirrors."""
    return [line for line in dump.splitlines() if PASSED_ON.match(line)]


def machine_options() -> list[str]:
    """How this machine reaches its mirrors (proxy, certificates), as apt.conf lines."""
    return passed_on(run.run(["apt-config", "dump"]).stdout.decode(errors="replace"))


def archive_state(lines: Iterable[str], folder: str) -> ArchiveState:
    """Fetch the signed release indices of the sources.list `lines`; no package lists.

    `folder` keeps them, so that an unchanged archive costs one request each.  Works without
    root and leaves the system's apt alone.  Raises BuildError when a mirror does not answer.
    """
    lists = os.path.join(folder, "lists")
    os.makedirs(os.path.join(lists, "partial"), exist_ok=True)
    listing = os.path.join(folder, "sources.list")
    config = os.path.join(folder, "apt.conf")
    _write(listing, "".join(line + "\n" for line in lines))
    _write(config, _private_config(folder, lists, listing))
    env = {**os.environ, "APT_CONFIG": config, "LC_ALL": "C"}
    argv = ["apt-get", "--error-on=any", "update"]
    run.run(argv, env=env, timeout=300, hint="is the mirror reachable? try: apt-get update")
    return read_state(lists)


def _private_config(folder: str, lists: str, listing: str) -> str:
    # Read after the machine's own files: proxies stay, places and hooks are replaced.
    return f"""#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::State::Lists "{lists}";
Dir::Cache "{folder}";
Dir::Etc::SourceList "{listing}";
Dir::Etc::SourceParts "/dev/null";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::IndexTargets::deb::Packages::DefaultEnabled "false";
"""


def read_state(lists: str) -> ArchiveState:
    """The state that the release files in the folder `lists` describe."""
    digest, epoch = hashlib.sha256(), 0
    for name in sorted(os.listdir(lists)):
        if not name.endswith("Release"):
            continue
        with open(os.path.join(lists, name), "rb") as handle:
            content = handle.read()
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        epoch = max(epoch, release_date(content.decode(errors="replace")))
    if not epoch:
        raise BuildError("the mirror sent no release file with a date", UPDATE_HINT)
    return ArchiveState(digest.hexdigest(), epoch)


def release_date(text: str) -> int:
    """Seconds since 1970 of a release file's Date field, 0 where it has none."""
    match = re.search(r"^Date: (.+)$", text, re.MULTILINE)
    if match is None:
        return 0
    try:
        return int(email.utils.parsedate_to_datetime(match[1]).timestamp())
    except ValueError:
        return 0


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)
