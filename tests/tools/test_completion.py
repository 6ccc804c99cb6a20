"""The completion script in a real shell."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from apppot.host.commands.table import COMMANDS
from apppot.host.process.run import run

ROOT = Path(__file__).resolve().parents[2]

SIMULATION = """
apppot() { "$PYTHON" -c 'from apppot.host.cli import main; main()' "$@"; }
source <(apppot completion bash)
complete -p apppot >/dev/null || exit 1
function=$(complete -p apppot | sed 's/.*-F \\([^ ]*\\).*/\\1/')
while read -r line; do
    read -ra COMP_WORDS <<<"$line"
    [[ $line == *_ ]] && COMP_WORDS[-1]=""
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    "$function" apppot "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
    echo "${COMPREPLY[*]}"
done
"""


@pytest.mark.tools
def test_bash_completes(tmp_path: Path) -> None:
    lines = {
        "apppot _": " ".join(COMMANDS),
        "apppot run --tim": "--time --timeline",
        "apppot run --mem 1G ho": "host",
        "apppot run --job-dir sub": "subject",
        "apppot image ins": "inspect",
        "apppot completion _": "bash zsh fish tcsh",
    }
    (tmp_path / "subject").mkdir()
    paths = os.pathsep.join([str(ROOT / "tests" / "typeroot"), *filter(None, sys.path)])
    env = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "PYTHONPATH": paths,
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "APPPOT_SITE_STORE": str(tmp_path / "site"),
    }
    words = "\n".join(lines).encode() + b"\n"
    done = run(["bash", "-c", SIMULATION], stdin=words, env=env, cwd=tmp_path, timeout=60)
    assert done.stdout.decode().splitlines() == list(lines.values()), done.stderr.decode()
