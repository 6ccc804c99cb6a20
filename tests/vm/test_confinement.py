"""What guest root can reach of the host; each attack succeeds without confinement."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher, argv

CONFINED = ("bubblewrap", "landlock")

# Prints "went MARK" for each thing that the guest could do to DIRECTORY on the host.
ATTACK = """
uname -r
mkdir /m
mount -t hostfs -o / none /m 2>/dev/null || exit 0
cat "/m$1/secret" 2>/dev/null && echo went read
(echo guest > "/m$1/planted") 2>/dev/null && echo went write
chmod 777 "/m$1/secret" 2>/dev/null && echo went chmod
touch -d 2001-01-01 "/m$1/secret" 2>/dev/null && echo went utime
rm "/m$1/victim" 2>/dev/null && echo went remove
true
"""


def attack(apppot: Launcher, directory: Path, confine: str) -> list[str]:
    (directory / "secret").write_text("the host's\n")
    (directory / "secret").chmod(0o600)
    (directory / "victim").write_text("")
    options = ("--confine", confine, "--network", "none", "-u", "root")
    result = apppot(*options, IMAGE, "sh", "-c", ATTACK, "sh", str(directory))
    lines = result.ok().decode().splitlines()
    assert lines[0].startswith(RELEASE)
    return [line.removeprefix("went ") for line in lines if line.startswith("went ")]


def test_the_attack_works_without_confinement(apppot: Launcher, place: Path) -> None:
    target = place / "host"
    target.mkdir()
    assert attack(apppot, target, "off") == ["read", "write", "chmod", "utime", "remove"]
    assert (target / "planted").read_text() == "guest\n"
    assert stat.S_IMODE((target / "secret").stat().st_mode) == 0o777


@pytest.mark.parametrize("confine", CONFINED)
def test_guest_root_reaches_nothing_of_the_host(
    apppot: Launcher, place: Path, confine: str
) -> None:
    target = place / "host"
    target.mkdir()
    assert attack(apppot, target, confine) == []
    assert sorted(os.listdir(target)) == ["secret", "victim"]
    assert stat.S_IMODE((target / "secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("confine", CONFINED)
def test_the_job_directory_can_be_used_in_full(apppot: Launcher, confine: str) -> None:
    script = (
        "uname -r; echo hi > f; chmod 640 f; touch -d '2001-02-03 04:05:06.123456789 UTC' f;"
        "mkdir d; chmod 700 d; ln -s f l; mv d e; cat f; rm l"
    )
    result = apppot("--confine", confine, "--network", "none", IMAGE, "sh", "-c", script)
    assert result.ok().decode().splitlines()[1:] == ["hi"]
    found = (apppot.work / "f").stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert found.st_mtime_ns == 981173106123456789
    assert stat.S_IMODE((apppot.work / "e").stat().st_mode) == 0o700
    assert not (apppot.work / "l").is_symlink()


@pytest.mark.parametrize("confine", CONFINED)
def test_confined_as_an_ordinary_user(user: Launcher, confine: str) -> None:
    script = "uname -r; id -u; echo x > made; sudo -n id -u"
    result = user("--confine", confine, "--network", "none", IMAGE, "sh", "-c", script)
    lines = result.ok().decode().splitlines()
    assert lines[0].startswith(RELEASE)
    assert lines[1:] == [str(user.who.uid), "0"]
    assert (user.work / "made").stat().st_uid == user.who.uid


def test_the_hypervisor_process_holds_no_capabilities(apppot: Launcher) -> None:
    """As root too: what breaks out of the guest must not be root of the host."""
    running = apppot.start("--network", "none", IMAGE, "sh", "-c", "uname -r; exec sleep 60")
    assert running.line().decode().startswith(RELEASE)
    kernels = 0
    for pid in running.family():
        with contextlib.suppress(FileNotFoundError):  # it may end meanwhile
            if argv(pid)[0].endswith(b"/kernel"):
                status = Path(f"/proc/{pid}/status").read_text()
                assert "CapEff:\t0000000000000000\n" in status
                assert "NoNewPrivs:\t1\n" in status
                kernels += 1
    assert kernels >= 1


def test_required_says_what_is_missing(apppot: Launcher, place: Path) -> None:
    """A PATH without bubblewrap: `bubblewrap` cannot be had, `required` falls to Landlock."""
    bare = place / "bin"
    bare.mkdir()
    for name in ("sh", "rm", "stty"):
        (bare / name).symlink_to(f"/usr/bin/{name}")
    env = {"PATH": str(bare), "XDG_CACHE_HOME": str(place / "cache")}
    words = ("--network", "none", IMAGE, "uname", "-r")
    apppot("--confine", "bubblewrap", *words, env=env).failed("bubblewrap is not installed")
    assert apppot("--confine", "required", *words, env=env).ok().decode().startswith(RELEASE)
