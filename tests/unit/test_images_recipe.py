"""Recipes, the machine's apt configuration and mmdebstrap's command line: parsing only."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from apppot.host.commands.options import wish
from apppot.host.commands.table import build_parser
from apppot.host.common.errors import ImageError, UsageError
from apppot.host.common.progress import Progress
from apppot.host.images.building import apt, builder, recipe, steps
from apppot.host.images.probe import ImageFormat, Probed
from apppot.host.images.record import Image, Record
from hypothesis import given
from hypothesis import strategies as st

MINIMAL = '[base]\nsuite = "bookworm"\n'
WHOLE = """
packages = ["hmmer", "curl", "curl"]
[base]
suite = "bookworm"
[image]
name = "tool"
version = "2.1"
command = "tool --help 'two words'"
user = "root"
env = { B = "2", A = "1" }
source_date_epoch = 1700000000
[files]
"/etc/motd" = "hello\\n"
"/usr/local/bin/tool" = { content = "#!/bin/sh\\n", mode = "0755" }
"""
TARGETS = """\
http://mirror/debian/ bookworm main Debian
http://mirror/debian/ bookworm main Debian
http://mirror/debian/ bookworm contrib Debian
http://mirror/debian/ bookworm-updates main Debian
http://mirror/debian/ bookworm-backports main Debian
http://mirror/security/ bookworm-security main Debian
http://other/ nodistro main Other
"""


def test_a_whole_recipe() -> None:
    got = recipe.parse(WHOLE, "/recipes/x.toml")
    assert (got.name, got.version, got.suite) == ("tool", "2.1", "bookworm")
    assert got.packages == ("curl", "hmmer")
    assert got.command == ("tool", "--help", "two words")
    assert got.env == (("A", "1"), ("B", "2"))
    assert got.epoch == 1700000000
    assert [(file.path, file.mode) for file in got.files] == [
        ("/etc/motd", 0o644),
        ("/usr/local/bin/tool", 0o755),
    ]


def test_a_recipe_on_a_parent_with_steps() -> None:
    got = recipe.parse(
        'run = ["make", "make install"]\n[base]\nparent = "debian-12:1"', "/r/x.toml"
    )
    assert (got.parent, got.suite, got.run) == ("debian-12:1", "", ("make", "make install"))
    plain = recipe.parse(MINIMAL, "/r/x.toml")
    assert "run" not in plain.inputs() and "parent" not in plain.inputs()


def test_a_child_has_what_its_recipe_does_not_say_from_its_parent() -> None:
    parent = Record(
        *("p", "base", "1", "squashfs", 0),
        command=("one",),
        entrypoint=("/entry",),
        env={"A": "1", "B": "1"},
        workdir="/data",
        user="app",
    )
    own = Record("", "child", "1", "squashfs", 0, env={"B": "2"})
    got = builder._inherited(own, parent, "p" * 64)
    assert (got.parent, got.entrypoint, got.command) == ("p" * 64, ("/entry",), ("one",))
    assert (got.env, got.workdir, got.user) == ({"A": "1", "B": "2"}, "/data", "app")
    got = builder._inherited(replace(own, command=("two",)), parent, "p" * 64)
    assert (got.entrypoint, got.command) == ((), ("two",))


def test_the_launcher_of_a_build() -> None:
    probed = Probed(ImageFormat.RAW, 1 << 20, "mbr", 1 << 16, 1 << 19)
    image = Image("/images/a disk.img", ImageFormat.RAW, None, None, probed)
    command = steps.guest_command(image, True, ("a", "b"), ("make", "make install"), 17)
    asked = wish(build_parser("run").parse_args(command.argv()[3:]))
    assert (asked.image, asked.neutral, asked.stdin) == ("/images/a disk.img", True, True)
    assert asked.env == {b"SOURCE_DATE_EPOCH": b"17"}
    assert (asked.entrypoint, asked.tty, asked.workdir) == ((), False, "/")
    assert (asked.options.user, asked.options.job_dir) == ("root", "none")
    assert (asked.options.network, asked.options.hypervisor) == ("user", "uml")
    assert asked.argv[:2] == (b"/bin/sh", b"-c")
    assert asked.argv[3:] == (b"sh", b"files", b"a b", b"make", b"make install")


def test_a_recipe_is_named_after_its_file() -> None:
    assert recipe.parse(MINIMAL, "/recipes/my-tool.toml").name == "my-tool"


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("pakages = []\n" + MINIMAL, "`pakages`", "packages"),
        ('[base]\nsuit = "x"', "`base.suit`", "base.suite"),
        ('run = ["a", " "]\n' + MINIMAL, "empty step", ""),
        (MINIMAL + 'parent = "debian-12"', "stands alone", ""),
        ("", "base.suite", "bookworm"),
        ("packages = 3\n" + MINIMAL, "list of strings", ""),
        ('packages = ["a b"]\n' + MINIMAL, "package's name", ""),
        ('packages = ["--x"]\n' + MINIMAL, "package's name", ""),
        (MINIMAL + '[image]\nname = "../x"', "cannot be a name", ""),
        (MINIMAL + '[image]\nversion = "latest"', "cannot be a version", ""),
        (MINIMAL + "[image]\nsource_date_epoch = -1", "seconds", ""),
        (MINIMAL + '[files]\n"etc/x" = ""', "absolute path", ""),
        (MINIMAL + '[files]\n"/etc/../x" = ""', "absolute path", ""),
        (MINIMAL + '[files]\n"/x" = {}', "either `content` or `source`", ""),
        (MINIMAL + '[files]\n"/x" = { content = "", mode = "999" }', "octal", ""),
        ("x = = 1", "recipe", ""),
    ],
)
def test_mistakes_are_named(text: str, problem: str, hint: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        recipe.parse(text, "x.toml")
    assert hint in caught.value.hint


def test_files_come_from_the_recipes_own_folder_only(tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tool.sh").write_bytes(b"\x00\xff")
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(tmp_path / "secret")
    path = str(folder / "x.toml")
    text = MINIMAL + '[files]\n"/x" = {{ source = "{}" }}'
    assert recipe.parse(text.format("tool.sh"), path).files[0].content == b"\x00\xff"
    for source in ("../secret", "link", str(tmp_path / "secret")):
        with pytest.raises(UsageError, match="outside"):
            recipe.parse(text.format(source), path)


def test_what_decides_about_an_image_is_in_its_key() -> None:
    state = apt.ArchiveState("0" * 64, 1)

    def key(text: str, path: str = "x.toml", now: apt.ArchiveState = state) -> str:
        return builder.cache_key(recipe.parse(text, path), ["deb"], now)

    named = WHOLE
    assert key(named) == key(named, "elsewhere/x.toml")
    assert key(named) != key(named.replace("hello", "hullo"))
    assert key(named) != key(named.replace("hmmer", "nano"))
    assert key(named) != key(named, now=apt.ArchiveState("1" * 64, 1))


def test_shipped_recipes_are_found_and_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("APPPOT_RECIPES", raising=False)
    assert recipe.load("debian-12").suite == "bookworm"
    assert recipe.load("hmmer.toml").command == ("hmmsearch", "-h")
    with pytest.raises(UsageError) as caught:
        recipe.load("debain-12")
    assert "debian-12" in caught.value.hint


@given(st.text())
def test_any_text_is_a_recipe_or_a_usage_error(text: str) -> None:
    try:
        recipe.parse(text, "x.toml")
    except UsageError:
        pass


def test_sources_are_the_machines_own() -> None:
    got = apt.parse_targets(TARGETS, "bookworm", "bookworm", ["main"])
    assert [(source.uri, source.release) for source in got] == [
        ("http://mirror/debian/", "bookworm"),
        ("http://mirror/debian/", "bookworm-updates"),
        ("http://mirror/security/", "bookworm-security"),
    ]
    assert got[0].line("/k.gpg") == "deb [signed-by=/k.gpg] http://mirror/debian/ bookworm main"


def test_another_release_comes_from_the_same_mirrors() -> None:
    got = apt.parse_targets(TARGETS, "bookworm", "trixie", ["main"])
    assert [source.release for source in got] == ["trixie", "trixie-updates", "trixie-security"]


def test_only_the_way_to_the_mirror_is_passed_on() -> None:
    lines = [
        'Acquire::http::Proxy "http://proxy:3128";',
        'Acquire::https::CaInfo "/etc/ssl/site.crt";',
        'Acquire::Check-Valid-Until "false";',
        'Acquire::AllowInsecureRepositories "1";',
        'Acquire::Changelogs::URI "";',
        'APT::Install-Recommends "1";',
        'Acquire::https::Verify-Peer "false";',
    ]
    assert apt.passed_on("\n".join(lines)) == [*lines[:3], lines[6]]


def test_the_archives_state_is_its_release_files(tmp_path: Path) -> None:
    (tmp_path / "m_dists_bookworm_InRelease").write_text("Date: Sat, 01 Jan 2000 00:00:00 UTC\n")
    (tmp_path / "m_dists_updates_InRelease").write_text("Date: Sun, 02 Jan 2000 00:00:00 UTC\n")
    (tmp_path / "lock").touch()
    first = apt.read_state(str(tmp_path))
    assert first.epoch == 946771200
    assert apt.read_state(str(tmp_path)) == first
    (tmp_path / "m_dists_updates_InRelease").write_text("Date: Mon, 03 Jan 2000 00:00:00 UTC\n")
    assert apt.read_state(str(tmp_path)).digest != first.digest


def test_mmdebstraps_command_line() -> None:
    argv = builder.bootstrap_argv(
        recipe.parse(WHOLE, "x.toml"), builder.BuildMode.UNSHARE, "/o", ["deb m s"], "/f f", "/p"
    )
    assert argv[-3:] == ["bookworm", "-", "deb m s"]
    assert argv[argv.index("mmdebstrap") - 1] == "/p"
    assert "--mode=unshare" in argv
    assert "--include=usr-is-merged,curl,hmmer" in argv
    assert "--customize-hook=tar-in '/f f' /" in argv
    clean = next(word for word in argv if "rm -f" in word)
    assert "etc/resolv.conf" in clean and "etc/hostname" in clean and "99mmdebstrap" in clean


def test_a_build_as_root_mounts_in_a_namespace_of_its_own() -> None:
    def argv(mode: builder.BuildMode) -> list[str]:
        return builder.bootstrap_argv(recipe.parse(WHOLE, "x.toml"), mode, "/o", [], "", "/p")

    assert "--mount" in argv(builder.BuildMode.ROOT)
    assert "--mount" not in argv(builder.BuildMode.UNSHARE)


def test_recipe_files_become_roots_own() -> None:
    content = builder.files_tar(recipe.parse(WHOLE, "x.toml").files, 5)
    assert content == builder.files_tar(recipe.parse(WHOLE, "y.toml").files, 5)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = {member.name: member for member in archive}
    assert members["usr/local/bin/tool"].mode == 0o755
    assert {(member.uid, member.mtime) for member in members.values()} == {(0, 5)}


def test_progress_never_runs_backwards() -> None:
    progress = Progress("test", builder.PACKED)
    watcher, seen = builder.BuildWatcher(progress), [0]
    for count in (3, 2):
        watcher.line(f"0 upgraded, {count} newly installed, 0 to remove and 0 not upgraded.")
        for verb in ("Unpacking", "Setting up"):
            for package in range(count + 1):
                watcher.line(f"{verb} p{package} (1) ...")
                seen.append(progress.done)
    watcher.line("I: creating tarball...")
    seen.append(progress.done)
    assert seen == sorted(seen) and seen[-1] == 800


def test_a_bad_name_stops_before_anything_is_built() -> None:
    with pytest.raises(ImageError):
        builder.build(recipe.parse(WHOLE, "x.toml"), "Bad Name")
