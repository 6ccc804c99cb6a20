"""The whole cycle: an expert's base, a user's session on it, a job at another site."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from apppot.host.common import paths

from tests.harness.layers import QUIET, WORK, apart, listing, tool
from tests.harness.vm import IMAGE, RELEASE, Launcher, Who, myself
from tests.harness.webserver import serving

pytestmark = pytest.mark.timeout(600)
Factory = Callable[[Who], Launcher]

RECIPE = f"""
run = ["echo 'made by an expert' >/etc/lab", "mkdir /opt/lab; ln -s lab /opt/current"]
[base]
parent = "{IMAGE}"
[image]
name = "lab"
version = "1"
command = ["cat", "/etc/lab"]
"""
PACKAGES = ("tcc", "libc6-dev")
# What a user does at a prompt, as root of the own machine.
INSTALL = f"""
set -e
apt-get -q update >/dev/null
apt-get -q -y --no-install-recommends install {" ".join(PACKAGES)} >/dev/null
echo 'int puts(const char *); int main(void) {{ puts("my own program"); return 42; }}' >/opt/own.c
tcc -o /usr/local/bin/own /opt/own.c
echo 'edited by a user' >>/etc/lab; rm /opt/current; mv /opt/lab /opt/laboratory
"""


@pytest.fixture
def expert(launcher_for: Factory, place: Path) -> Launcher:
    """Somebody with all base images and a key."""
    return launcher_for(apart(myself(), place / "expert"))


@pytest.fixture
def packages(place: Path) -> Path:
    """The libraries that a pull needs, where everybody can read them."""
    needed = {"requests", "urllib3", "idna", "certifi", "charset_normalizer", "cryptography"}
    needed |= {"cffi", "_cffi_backend", "zstandard", "pyfastcdc"}
    (place / "packages").mkdir()
    for found in Path(sysconfig.get_paths()["platlib"]).iterdir():
        if found.name.split(".")[0] in needed:
            copy = shutil.copytree if found.is_dir() else shutil.copy
            copy(found, place / "packages" / found.name)
    return place / "packages"


@pytest.fixture
def elsewhere(
    launcher_for: Factory, ordinary: Who, packages: Path, place: Path
) -> Callable[[str, int], Launcher]:
    """Makes users of other sites: no image, nobody's settings."""

    def make(name: str, more: int) -> Launcher:
        uid = ordinary.uid + more if os.getuid() == 0 else ordinary.uid
        who = apart(
            replace(ordinary, uid=uid, gid=uid if os.getuid() == 0 else ordinary.gid), place / name
        )
        env = {"HOME": str(place / name), "APPPOT_SITE_STORE": str(place / "none")}
        env["APPPOT_POT"] = who.env.get("APPPOT_POT") or paths.pot_home()
        env["XDG_CACHE_HOME"] = str(place / name / "cache")
        env["PYTHONPATH"] = f"{who.env.get('PYTHONPATH', '')}:{packages}"
        return launcher_for(replace(who, env={**who.env, **env}))

    return make


@pytest.fixture
def web(expert: Launcher) -> Iterator[tuple[str, str]]:
    """The URL of a repository with the expert's image, and the key to it."""
    (expert.work / "lab.toml").write_text(RECIPE)
    assert tool(expert, "image", "build", "./lab.toml").status == 0
    key = tool(expert, "key", "create").ok().decode().strip()
    assert tool(expert, "publish", "www", "lab").status == 0
    with serving(expert.work / "www") as server:
        yield server.url, key


def pull(user: Launcher, web: tuple[str, str]) -> None:
    url, key = web
    assert tool(user, "pull", f"{url}/lab").status == 125, "not trusted yet"
    assert tool(user, "key", "trust", key, "--repository", url).status == 0
    done = tool(user, "pull", f"{url}/lab")
    assert done.status == 0, done
    assert user(*QUIET, "lab").ok() == b"made by an expert\n"


def console(user: Launcher, line: str, *options: str) -> None:
    """Type `line` at a console in the session, see that it went well, and leave."""
    terminal = user.terminal("--session", "dev", *options, "lab", command="console")
    try:
        terminal.type(line.encode() + b" && echo $(uname -r) went $((40 + 2))\r")
        terminal.expect(b" went 42", timeout=240)
        assert f"{RELEASE}." in terminal.seen.decode(errors="replace")
        terminal.type(b"exit\r")
        assert terminal.running.wait() == 0
    finally:
        terminal.running.kill()
        terminal.close()


def seen(user: Launcher, *options: str) -> list[bytes]:
    """The listing, in which the user's own ids have a name."""
    own = b"|%d:%d|" % (user.who.uid, user.who.gid)
    return [line.replace(own, b"|user:user|") for line in listing(user, *options, image="lab")]


def test_from_the_expert_to_the_job(
    web: tuple[str, str], elsewhere: Callable[[str, int], Launcher], place: Path
) -> None:
    user = elsewhere("user", 0)
    pull(user, web)
    (user.work / "install").write_text(INSTALL)
    (user.work / "work").write_text(WORK)
    console(user, "sudo sh ~/job/install && echo mine >~/notes")
    console(user, "sudo sh ~/job/work && own | grep own && cat ~/notes", *QUIET)
    state = seen(user, "--session", "dev")
    assert tool(user, "changes", "save", "dev").status == 0
    assert seen(user, "--session", "dev") == state, "saving changed the session"

    site = elsewhere("site", 1)
    pull(site, web)
    subprocess.run(["cp", user.work / "dev.changes", site.work], check=True)
    assert seen(site, "--changes", "dev.changes") == state
    script = "uname -r; cat /etc/lab ~/notes; stat -c %U ~/notes; dpkg -s tcc | grep ^Status; own"
    done = site("--changes", "dev.changes", *QUIET, "lab", "sh", "-c", script)
    lines = done.out.decode().splitlines()
    assert (done.status, lines[0].startswith(RELEASE)) == (42, True)
    told = ["made by an expert", "edited by a user", "mine", "user"]
    assert lines[1:] == [*told, "Status: install ok installed", "my own program"]
    assert not (place / "site" / "apppot" / "sessions").exists()
