"""Commit: base and changes, or a session, as an image of its own."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from apppot.host.images.record import Record
from apppot.host.images.resolve import resolve

from tests.harness.layers import QUIET, WORK, apart, busybox_tree, listing, tool
from tests.harness.vm import IMAGE, RELEASE, Launcher, Who, myself

Factory = Callable[[Who], Launcher]


@pytest.fixture
def apppot(launcher_for: Factory, place: Path) -> Launcher:
    return launcher_for(apart(myself(), place / "data"))


@pytest.fixture
def session(apppot: Launcher) -> str:
    """A session in which WORK was done."""
    result = apppot("--session", "dev", *QUIET, "-u", "root", IMAGE, "sh", "-c", WORK)
    assert result.ok().decode().startswith(RELEASE)
    return "dev"


def committed(apppot: Launcher, *words: str) -> dict[str, Any]:
    """The record of what `apppot image commit WORDS` made."""
    done = tool(apppot, "image", "commit", "--json", *words)
    assert done.status == 0, done
    record: dict[str, Any] = json.loads(done.out)
    return record


def test_it_equals_base_and_changes(apppot: Launcher, session: str) -> None:
    assert tool(apppot, "changes", "save", session, "-o", "it.changes").status == 0
    record = committed(apppot, IMAGE, "--changes", "it.changes", "tool:2", "-m", "with tools")
    base = resolve(IMAGE).record
    assert base is not None
    assert (record["parent"], record["command"]) == (base.digest, list(base.command))
    assert (record["distribution"], record["description"]) == (base.distribution, "with tools")
    again = committed(apppot, "--session", session, "twin")
    assert again["digest"] == record["digest"], "not reproducible"
    shown = listing(apppot, image="tool:2")
    assert shown == listing(apppot, "--changes", "it.changes")
    assert shown == listing(apppot, "--session", session), "it changed the session"
    assert b"/opt/future|f|644|0:0|0|4071006245.6000000000|1|" in shown
    assert tool(apppot, "image", "verify", "tool:2").status == 0


@pytest.fixture
def small(apppot: Launcher) -> Record:
    """A small base with everything that a record can say of running."""
    tree = apppot.work / "tree"
    busybox_tree(tree, ("sh", "cat", "rm", "uname", "id", "pwd"))
    (tree / "etc").mkdir()
    (tree / "etc" / "gone").write_text("gone")
    subprocess.run(["mksquashfs", tree, apppot.work / "s.squashfs", "-quiet"], check=True)
    env = apppot.environment()
    script = """
import sys; from apppot.host.images import store
from apppot.host.images.record import Record
from apppot.host.images.workspace import workspace
with workspace() as folder:
    import os, shutil; path = os.path.join(folder, "image"); shutil.copy(sys.argv[1], path)
    store.add(path, Record("", "small", "1", "squashfs", 0, command=("-c", "pwd; id -un"),
        entrypoint=("/bin/sh",), env={"A": "b c"}, workdir="/etc", user="root"))
"""
    python = str(Path(apppot.who.command[0]).with_name("python"))
    words = [python, "-c", script, str(apppot.work / "s.squashfs")]
    subprocess.run(words, env=env, check=True)
    shown = tool(apppot, "image", "inspect", "small", "--json").ok()
    return Record(**{k: v for k, v in json.loads(shown).items() if k in _FIELDS})


_FIELDS = Record.__dataclass_fields__


def test_it_runs_as_its_base_does(apppot: Launcher, small: Record) -> None:
    script = "uname -r; rm /etc/gone; echo kept >/etc/kept; echo $A"
    done = apppot("--session", "s", *QUIET, "small", "-c", script).ok().decode().splitlines()
    assert done[0].startswith(RELEASE) and done[1] == "b c"
    record = committed(apppot, "--session", "s", "next:1")
    kept = ("command", "entrypoint", "env", "workdir", "user")
    assert [record[name] for name in kept] == [getattr(small, name) for name in kept]
    assert apppot(*QUIET, "next").ok() == b"/etc\nroot\n"
    # A base of further changes, and for other tools.
    assert apppot("--session", "t", *QUIET, "next", "-c", "cat kept; rm kept").ok() == b"kept\n"
    assert committed(apppot, "--session", "t", "last")["parent"] == record["digest"]
    assert tool(apppot, "image", "export", "next", "-o", "n.tar").status == 0
    with tarfile.open(apppot.work / "n.tar") as tar:
        names = tar.getnames()
    assert "./etc/kept" in names and "./etc/gone" not in names
    assert tool(apppot, "key", "create").status == 0
    assert tool(apppot, "publish", "www", "next").status == 0
    # Nothing that the agent generates.
    assert not {"./etc/resolv.conf", "./etc/hostname", "./etc/sudoers.d"} & set(names)


def test_its_session_finds_its_image_when_the_name_has_moved(
    apppot: Launcher, small: Record
) -> None:
    words = ("--session", "s", *QUIET, "small", "-c")
    assert apppot(*words, "uname -r; echo 1 >/etc/one").ok().decode().startswith(RELEASE)
    newer = committed(apppot, "--session", "s", "small:2")
    assert committed(apppot, "--session", "s", "other")["digest"] == newer["digest"]
    assert tool(apppot, "changes", "save", "s").status == 0
    apppot(*words, "true").failed("session s belongs to small", "remedy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([IMAGE, "x"], "there is nothing to commit"),
        ([IMAGE], "NAME"),
        (["--session", "none", "x"], "there is no session none"),
        (["--session", "none", IMAGE, "x"], "a session knows its base"),
        (["host", "--changes", "x", "y"], "cannot be committed"),
        ([IMAGE, "--changes", "x", "Bad Name"], "cannot be an image's name"),
        ([IMAGE, "--changes", "missing", "x"], "does not exist"),
    ],
)
def test_a_wrong_command_line_is_explained(
    apppot: Launcher, words: list[str], message: str
) -> None:
    tool(apppot, "image", "commit", *words).failed(message, "remedy")
    assert not list(Path(apppot.who.env["XDG_DATA_HOME"]).glob("apppot/images/[rn]*"))
