"""What GNU tar writes is what the guest reads."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.harness.archives import read


@pytest.mark.parametrize("options", ["-z", "-j", "-J", "", "-z --format=pax"])
@pytest.mark.tools
def test_what_gnu_tar_lists_is_found(options: str, tmp_path: Path) -> None:
    tree, made = tmp_path / "tree", tmp_path / "a"
    (tree / "dir").mkdir(parents=True)
    files = {b"f": b"", b"dir/g": os.urandom(700_000), b"dir/" + b"n" * 150 + b"\n\xff": b"long"}
    for name, data in files.items():
        with open(os.fsencode(tree) + b"/" + name, "wb") as file:
            file.write(data)
    words = ["tar", "-C", str(tree), "-g", str(tmp_path / "state"), "-cf", str(made)]
    subprocess.run([*words, *options.split(), "."], check=True)
    found = read(made)
    assert found["."] == ([("D", "dir"), ("Y", "f")], b"")
    long = "n" * 150 + "\n\udcff"
    assert found["./dir"] == ([("Y", "g"), ("Y", long)], b"")
    for name, data in files.items():
        assert found["./" + name.decode(errors="surrogateescape")] == (None, data)
