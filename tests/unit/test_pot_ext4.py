"""What the ext4 writer puts into its script: order, owners, modes; nothing of the host."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from apppot.host.common.errors import BuildError
from apppot.host.pot.ext4 import ImageSpec, Inode, blocks_needed, merge, script

SPEC = ImageSpec("u", "l", 1, {"sudo": 0o4755, "tmp": 0o1777}, {"dev/null": (1, 3)})


def tree(root: Path) -> Path:
    for name in ("b", "dev", "tmp", "a.d"):
        (root / name).mkdir(parents=True)
    (root / "a").write_text("one")
    (root / "b" / "x").write_text("two")
    (root / "sudo").write_text("s")
    (root / "link").symlink_to("a")
    (root / "b" / "folderlink").symlink_to("../dev")
    (root / "a").chmod(0o700)
    return root


def test_entries_are_sorted_with_parents_first(tmp_path: Path) -> None:
    paths = [entry.path for entry in merge([tree(tmp_path)], SPEC)]
    assert paths == [
        "a",
        "a.d",
        "b",
        "b/folderlink",
        "b/x",
        "dev",
        "dev/null",
        "link",
        "sudo",
        "tmp",
    ]


def test_modes_are_ours(tmp_path: Path) -> None:
    modes = {entry.path: stat.S_IMODE(entry.mode) for entry in merge([tree(tmp_path)], SPEC)}
    assert modes["a"] == 0o755
    assert modes["b/x"] == 0o644
    assert modes["sudo"] == 0o4755
    assert modes["tmp"] == 0o1777
    assert modes["dev/null"] == 0o666


def test_a_later_folder_covers_an_earlier_one(tmp_path: Path) -> None:
    first, second = tree(tmp_path / "1"), tmp_path / "2"
    (second / "b").mkdir(parents=True)
    (second / "b" / "x").write_text("three")
    found = {entry.path: entry for entry in merge([first, second], SPEC)}
    assert found["b/x"].source == str(second / "b" / "x")
    assert "a" in found


def test_the_script_sets_owner_and_mode() -> None:
    entries = [
        Inode("d", stat.S_IFDIR | 0o755),
        Inode("d/f", stat.S_IFREG | 0o644, source="/s/f", size=1),
        Inode("d/l", stat.S_IFLNK | 0o777, target="f"),
        Inode("n", stat.S_IFCHR | 0o666, device=(1, 3)),
    ]
    assert script(entries).splitlines() == [
        'mkdir "d"',
        'sif "d" mode 040755',
        'cd "/d"',
        'write "/s/f" "f"',
        'sif "f" mode 0100644',
        'sif "f" uid 0',
        'sif "f" gid 0',
        'symlink "l" "f"',
        'cd "/"',
        'mknod "n" c 1 3',
        'sif "n" mode 020666',
    ]


def test_a_name_that_could_be_a_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'a"\nrm b').write_text("")
    with pytest.raises(BuildError, match="odd characters"):
        merge([tmp_path], SPEC)


def test_the_size_covers_every_file() -> None:
    entries = [Inode(f"f{n}", stat.S_IFREG | 0o644, size=4097) for n in range(100)]
    assert blocks_needed(entries, 128) > 200
