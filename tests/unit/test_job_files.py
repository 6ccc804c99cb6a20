"""Patterns of files, what is planned for them, and the archive on the config drive."""

from __future__ import annotations

import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apppot.guest.protocol import drive, globs
from apppot.host.common.errors import Unsuited, UsageError
from apppot.host.config import settings
from apppot.host.hypervisor.base import Share
from apppot.host.hypervisor.uml import Uml
from apppot.host.machine import inputs
from apppot.host.plan.jobfiles import JobFiles, plan_files
from apppot.host.plan.request import Bind, Findings, Request
from hypothesis import given
from hypothesis import strategies as st

from tests.harness.plans import FOUND, HOST, IMAGE, plan


class Alone(Uml):
    """A hypervisor that can show no directories of the host."""

    share: Share | None = None


ALONE = replace(FOUND, hypervisor=Alone(HOST))


def planned(how: str, found: Findings = FOUND, **asked: Any) -> JobFiles:
    values: dict[str, Any] = {name: tuple(texts) for name, texts in asked.items()}
    request = replace(Request(None, ()), **values)
    return plan_files(request, settings.Setting(how, "--job-files"), found)


def test_share_and_copy() -> None:
    assert planned("auto") == planned("share") == JobFiles(copy=False)
    assert planned("copy") == planned("auto", ALONE) == JobFiles(copy=True)
    assert planned("copy", replace(FOUND, job_directory=None)) == JobFiles(copy=False)
    assert not planned("auto").come_back()
    assert planned("copy").come_back()


def test_paths_of_the_job_directory_are_relative() -> None:
    made = planned("copy", outputs=["/home/user/job/a/*", "./b", "c/../d"], follow=["/tmp/x"])
    assert made.outputs == (b"a/*", b"b", b"d")
    assert made.follow == (b"/tmp/x",)
    shared = planned("share", follow=["log", "/home/user/job/log", "/tmp/log"])
    assert shared.follow == (b"/tmp/log",)


@pytest.mark.parametrize(
    ("how", "asked", "words"),
    [
        ("share", {"outputs": ["results"]}, "is shared"),
        ("share", {"inputs": ["*"]}, "is shared"),
        ("copy", {"inputs": ["/etc/*"]}, "in the job directory"),
        ("copy", {"outputs": ["../x"]}, "names nothing"),
        ("copy", {"outputs": [""]}, "names nothing"),
        ("copy", {"follow": ["/"]}, "names nothing"),
        ("copy", {"follow": ["/home/user/job"]}, "names nothing"),
        ("copy", {"follow": ["log", "/tmp/log"]}, "two files would be log"),
    ],
)
def test_what_cannot_be(how: str, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        planned(how, **asked)
    assert words in caught.value.cause
    assert caught.value.hint or "two files" in words


def test_without_a_job_directory() -> None:
    with pytest.raises(UsageError):
        planned("copy", replace(FOUND, job_directory=None), outputs=["x"])
    with pytest.raises(UsageError):
        planned("share", ALONE)


def test_a_hypervisor_without_shares_is_not_for_binds_or_the_hosts_root() -> None:
    bind = Bind("/data", "/srv", True, False)
    for request in (Request(None, ()), Request(IMAGE, (), binds=(bind,))):
        with pytest.raises(Unsuited, match="directories of this host"):
            plan(request, ALONE)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.c", "b.c", ".h.c", "d/e.c", "d/.x/f.c", "d/g/h.c", "[x]"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to("d")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.c", "a.c"), ("*.c", "a.c b.c"), (".*.c", ".h.c"), ("?.[bc]", "a.c b.c"),
        ("d/*", "d/e.c d/g"), ("**/*.c", "d/e.c d/g/h.c a.c b.c"), ("d/**/h.c", "d/g/h.c"),
        ("link/e.c", ""), ("*/e.c", "d/e.c"), ("link", "link"), ("no", ""), ("d/.x", "d/.x"),
        ("./a.c//", "a.c"), ("**", "a.c b.c d/e.c d/g/h.c link [x]"),
    ],
)  # fmt: skip
def test_patterns(tree: Path, pattern: str, expected: str) -> None:
    found = {os.fsdecode(path) for path in globs.find(os.fsencode(tree), pattern.encode())}
    assert found == set(expected.split())


@pytest.mark.parametrize("pattern", [b"", b"/", b"..", b"a/../b", b"a\0", b"./."])
def test_bad_patterns(pattern: bytes) -> None:
    with pytest.raises(globs.GlobError):
        globs.checked(pattern)


@given(st.binary(max_size=12))
def test_any_pattern_finds_what_is_below(
    tmp_path_factory: pytest.TempPathFactory, pattern: bytes
) -> None:
    top = tmp_path_factory.getbasetemp() / "patterns"
    (top / "a" / "b").mkdir(parents=True, exist_ok=True)
    try:
        found = list(globs.find(os.fsencode(top), pattern))
    except globs.GlobError:
        return
    assert set(found) <= {b"a", b"a/b"}


def written(directory: Path, *patterns: str) -> tarfile.TarFile:
    path = directory.parent / "drive"
    with open(path, "wb") as file:
        inputs.write(file, b"the job", str(directory), patterns)
    assert drive.read_job(str(path)) == b"the job"
    return tarfile.open(path, errors="surrogateescape")


def test_drive_is_a_tar_of_the_directory(tmp_path: Path) -> None:
    top = tmp_path / "dir"
    top.mkdir()
    (top / "\udcff").write_bytes(b"odd")
    (top / ("n" * 200)).write_bytes(b"long")
    os.utime(top / ("n" * 200), ns=(0, 1_234_567_890_123_456_789))
    with open(top / "sparse", "wb") as file:
        file.truncate(64 << 20)
    with written(top) as archive:
        names = archive.getnames()
        assert names == ["apppot/job.json", "job/" + "n" * 200, "job/sparse", "job/\udcff"]
        member = archive.getmember("job/" + "n" * 200)
        assert member.pax_headers["mtime"] == "1234567890.123456789"
        file = archive.extractfile("job/\udcff")  # type: ignore[assignment]
        assert file.read() == b"odd"
    found = (tmp_path / "drive").stat()
    assert found.st_size > 64 << 20
    assert found.st_blocks * 512 < 1 << 20


def test_what_is_chosen_has_its_parents(tree: Path) -> None:
    with written(tree, "d/g/*", "*.c", "d/g/h.c") as archive:
        assert archive.getnames()[1:] == ["job/d", "job/d/g", "job/d/g/h.c", "job/a.c", "job/b.c"]


def test_own_directory_is_not_copied(tree: Path) -> None:
    chosen = inputs.chosen(str(tree), (), str(tree / "d"))
    assert {path for path, _ in chosen} == {b"a.c", b"b.c", b".h.c", b"[x]", b"link"}
