"""The recipes as data: parsing, what a configuration lost, digests as cache keys."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from apppot.host.errors import BuildError
from apppot.host.pot import recipes
from apppot.host.pot.apt import Target, archive_mirror, parse_packages, parse_targets, sources
from apppot.host.pot.kernel import BUILD_STEP, series_order
from apppot.host.pot.runtime import matches


def test_the_kernel_recipe_is_whole() -> None:
    recipe = recipes.load_kernel()
    assert recipe.package == "linux-source-7.2"
    assert [path.name[:4] for path in recipe.patches] == [f"000{n}" for n in range(1, 9)]
    for path in recipe.patches:
        assert "SPDX-License-Identifier: GPL-2.0\n" in path.read_text()
    wanted = recipes.config_lines(recipe.config)
    assert wanted["CONFIG_STATIC_LINK"] == "y"
    assert wanted["CONFIG_MODULES"] == "n"


def test_a_fragment_names_each_option_once() -> None:
    lines = [
        line for line in recipes.load_kernel().config.splitlines() if line.startswith("CONFIG_")
    ]
    names = [line.split("=")[0] for line in lines]
    assert len(names) == len(set(names))


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
    folder = tmp_path / "uml"
    shutil.copytree(recipes.recipes("kernel/uml"), folder)
    before = recipes.load_kernel(folder)
    assert before.digest == recipes.load_kernel().digest
    patch = folder / "patches" / "0003-um-no-ipi-masking-on-one-cpu.patch"
    patch.write_text(patch.read_text() + "\n")
    assert recipes.load_kernel(folder).digest != before.digest


def test_a_missing_or_broken_recipe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="missing"):
        recipes.load_kernel(tmp_path)
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
    recipe = recipes.load_kernel()
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
