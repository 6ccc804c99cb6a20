"""The recipes as data: parsing, what a configuration lost, digests as cache keys."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path

import pytest
from apppot.host.common.errors import BuildError
from apppot.host.pot import recipes
from apppot.host.pot.apt import Target, archive_mirror, parse_packages, parse_targets, sources
from apppot.host.pot.kernel import BUILD_STEP, series_order
from apppot.host.pot.probe import xen_notes
from apppot.host.pot.runtime import matches


def test_the_recipe_of_uml_is_whole() -> None:
    recipe = recipes.load_kernel("uml")
    assert [path.name[:4] for path in recipe.patches] == [f"000{n}" for n in range(1, 10)]
    for path in recipe.patches:
        assert "SPDX-License-Identifier: GPL-2.0\n" in path.read_text()
    wanted = recipes.config_lines(recipe.config)
    assert wanted["CONFIG_STATIC_LINK"] == "y"
    assert wanted["CONFIG_MODULES"] == "n"


def test_all_kernels_have_one_source() -> None:
    source = recipes.load_source()
    assert source.package == "linux-source-7.2"
    own = [patch for name in recipes.KERNELS for patch in recipes.load_kernel(name).patches]
    assert list(source.patches) == own


@pytest.mark.parametrize("name", recipes.KERNELS)
def test_a_fragment_names_each_option_once(name: str) -> None:
    lines = recipes.load_kernel(name).config.splitlines()
    names = [line.split("=")[0] for line in lines if line.startswith("CONFIG_")]
    assert len(names) == len(set(names))


def test_the_x86_kernel_has_what_jobs_know_from_the_other() -> None:
    """All that a program may ask for: what is not the machine below."""
    machine = re.compile(r"HOSTFS|MCONSOLE|UBD|CONSOLE|CHAN|SSL|UML|STATIC_LINK|NR_CPUS")
    uml, x86 = (recipes.config_lines(recipes.load_kernel(name).config) for name in recipes.KERNELS)
    lost = [f"{name}={value}" for name, value in uml.items() if x86.get(name) != value]
    assert [line for line in lost if not machine.search(line)] == []


def test_an_option_that_did_not_survive_is_named() -> None:
    wanted = "CONFIG_A=y\nCONFIG_B=n\nCONFIG_C=16\nCONFIG_D=n\nCONFIG_E=y\n"
    got = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=8\nCONFIG_D=y\n"
    assert recipes.lost_options(wanted, got) == [
        "CONFIG_C=16 (is 8)",
        "CONFIG_D=n (is y)",
        "CONFIG_E=y (is n)",
    ]


def test_a_digest_changes_with_names_order_and_contents(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("ab")
    two.write_text("c")
    first = recipes.digest_files([one, two])
    assert first == recipes.digest_files([one, two])
    assert first != recipes.digest_files([two, one])
    one.write_text("a")
    two.write_text("bc")
    assert first != recipes.digest_files([one, two])
    assert recipes.digest_of("ab", "c") != recipes.digest_of("a", "bc")


def test_a_changed_patch_is_another_kernel(tmp_path: Path) -> None:
    folder = tmp_path / "kernel"
    shutil.copytree(recipes.recipes("kernel"), folder)
    uml, x86 = (recipes.load_kernel(name).digest for name in recipes.KERNELS)
    assert recipes.load_kernel("uml", folder).digest == uml
    patch = folder / "uml" / "patches" / "0003-um-no-ipi-masking-on-one-cpu.patch"
    patch.write_text(patch.read_text() + "\n")
    assert recipes.load_kernel("uml", folder).digest != uml
    assert recipes.load_kernel("x86_64", folder).digest == x86
    source = folder / "source.toml"
    source.write_text(source.read_text().replace("7.2", "7.3"))
    assert recipes.load_kernel("x86_64", folder).digest != x86


def test_a_missing_or_broken_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="missing"):
        recipes.load_kernel("uml", tmp_path)
    with pytest.raises(BuildError, match="missing"):
        recipes.load_source(tmp_path)
    (tmp_path / "recipe.toml").write_text("[source\n")
    with pytest.raises(BuildError, match="TOML"):
        recipes.load_runtime(tmp_path)
    (tmp_path / "recipe.toml").write_text("[source]\n")
    with pytest.raises(BuildError, match="lacks"):
        recipes.load_runtime(tmp_path)


def test_the_runtime_recipe_is_whole() -> None:
    recipe = recipes.load_runtime()
    assert {"python3-psutil", "busybox-static", "e2fsprogs"} <= set(recipe.packages)
    assert recipe.image.devices["dev/null"] == (1, 3)
    assert recipe.sudo.is_file() and recipe.llistxattr.is_file()
    assert recipe.init.read_text().startswith("#!/usr/bin/python3.11 -IS\n")
    # By this name the launcher calls it.
    assert recipe.links["usr/bin/python3"] == recipe.python.removeprefix("usr/bin/")


@pytest.mark.parametrize(
    ("path", "dropped"),
    [
        ("usr/lib/python3.11/test/test_os.py", True),
        ("usr/lib/python3.11/unittest/test/__init__.py", True),
        ("usr/share/doc/libc6/copyright", True),
        ("usr/lib/python3.11/ctypes/__init__.py", False),
        ("usr/lib/x86_64-linux-gnu/libc.so.6", False),
        ("usr/bin/python3.11", False),
        ("usr/bin/busybox", False),
        ("usr/bin/chattr", True),
        ("usr/sbin/mke2fs", False),
    ],
)
def test_what_is_pruned(path: str, dropped: bool) -> None:
    assert matches(path, recipes.load_runtime().drop) is dropped


def test_the_pinned_series_comes_first_then_the_newest() -> None:
    recipe = recipes.load_source()
    offered = ["linux-source-7.10", "linux-source-7.2", "linux-source-7.9", "linux-source-doc"]
    assert series_order(recipe, offered) == [
        "linux-source-7.2",
        "linux-source-7.10",
        "linux-source-7.9",
    ]
    assert series_order(recipe, ["linux-source-8.0"]) == ["linux-source-8.0"]


def test_only_debians_own_archive_counts_as_a_mirror() -> None:
    text = (
        "http://mirror.example/debian/\tbookworm\tDebian\n"
        "http://mirror.example/debian-security\tbookworm-security\tDebian\n"
        "https://other.example/apt\tstable\tOther\n"
        "broken line\n"
    )
    targets = parse_targets(text)
    assert targets == [
        Target("http://mirror.example/debian", "bookworm"),
        Target("http://mirror.example/debian-security", "bookworm-security"),
    ]
    mirror = archive_mirror(targets)
    assert mirror == "http://mirror.example/debian"
    made = sources(targets, mirror, ["trixie-backports", "bookworm-security", "trixie-security"])
    assert "URIs: http://mirror.example/debian\nSuites: trixie-backports\n" in made
    assert "URIs: http://mirror.example/debian-security\nSuites: bookworm-security\n" in made
    assert "URIs: http://mirror.example/debian-security\nSuites: trixie-security\n" in made
    assert made.count("Signed-By: ") == 3


def test_a_machine_without_a_mirror_is_told_so() -> None:
    with pytest.raises(BuildError, match="no Debian mirror"):
        archive_mirror([Target("http://mirror.example/debian-security", "bookworm-security")])
    assert archive_mirror([], "http://mine.example/debian/") == "http://mine.example/debian"


def test_a_package_without_a_digest_is_not_taken() -> None:
    text = (
        "Package: a\nVersion: 1\nSHA256: ff\n\n"
        "Package: b\nVersion: 2\n\n"
        "Package: c\nVersion: 3:1\nSHA256: ee\n"
    )
    found = parse_packages(text)
    assert [(package.name, package.version) for package in found] == [("a", "1"), ("c", "3:1")]
    assert found[0].file_name == "a_ff.deb"


def test_build_lines_that_count_as_steps() -> None:
    assert BUILD_STEP.match("  CC      fs/hostfs/hostfs_user.o")
    assert not BUILD_STEP.match("warning: CC is odd")


def test_notes_of_a_vmlinux_say_how_it_starts() -> None:
    def note(name: bytes, kind: int, data: bytes) -> bytes:
        head = struct.pack("<III", len(name), len(data), kind)
        return head + name + bytes(-len(name) % 4) + data + bytes(-len(data) % 4)

    data = note(b"GNU\0", 18, b"12345") + note(b"Xen\0", 18, b"1234") + note(b"Linux\0", 1, b"x")
    assert xen_notes(data) == {18}
    assert xen_notes(data + note(b"Xen\0", 1, bytes(8))) == {1, 18}
    assert xen_notes(data[:11]) == set()
