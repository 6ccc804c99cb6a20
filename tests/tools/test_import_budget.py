"""What the agent imports on its way to the payload; the launcher: test_launcher_modules."""

from __future__ import annotations

import os
from pathlib import Path

from apppot.host.process.run import run

_LIST = """
import sys
sys.path.insert(0, {root!r})
import apppot.guest.init.main
print(*sorted(sys.modules))
"""
ROOT = Path(__file__).resolve().parent.parent.parent
# Each costs milliseconds that the agent does not have.
BANNED = {
    "re", "enum", "socket", "json", "subprocess", "signal", "logging", "dataclasses", "typing",
    "pathlib", "selectors", "shutil", "argparse", "contextlib", "threading", "tempfile",
}  # fmt: skip
ALLOWED = {
    "__future__", "_collections_abc", "_ctypes", "_json", "_stat", "_struct", "_weakrefset", "abc",
    "_abc", "binascii", "ctypes", "ctypes._endian", "errno", "fcntl", "genericpath", "os",
    "os.path",
    "posixpath", "resource", "select", "stat", "struct", "termios",
}  # fmt: skip


def test_agent() -> None:
    program = _LIST.format(root=os.path.join(ROOT, "tests", "typeroot"))
    plain = run(["/usr/bin/python3", "-IS", "-c", "import sys; print(*sorted(sys.modules))"])
    loaded = run(["/usr/bin/python3", "-IS", "-c", program])
    mine = set(loaded.stdout.decode().split()) - set(plain.stdout.decode().split())
    assert not mine & BANNED
    assert {name for name in mine if not name.startswith("apppot")} <= ALLOWED
