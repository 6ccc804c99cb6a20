"""What pip installs works from wherever it was installed to."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from apppot.host.process.run import run

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from apppot.host.common import paths
assert paths.__file__.startswith(sys.path[0]), paths.__file__
from apppot.host.cli import main
main(sys.argv[1:])
"""


@pytest.mark.tools
@pytest.mark.timeout(300)
def test_recipes_come_along(tmp_path: Path) -> None:
    """As package data: files below sys.prefix would not be found after `--target` or `--user`."""
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("guest", "host", "image-recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    run([*pip, str(target), str(source)])
    recipes = target / "apppot" / "recipes"
    assert os.access(recipes / "runtime" / "apppot-init", os.X_OK)
    assert not (recipes / "host").exists() and not (recipes / "lab").exists()
    words = [sys.executable, "-c", PROGRAM, str(target), "image", "build", "nothing"]
    done = run(words, check=False, cwd=tmp_path)
    assert done.returncode == 125
    assert b"there are: debian-12, " in done.stderr
