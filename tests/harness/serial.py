"""The serial line, or UML's console, of a machine that was started without the launcher."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

# An emulated processor beside other tests.
BOOT_SECONDS = 100


def until_off(argv: Sequence[str]) -> str:
    """What a machine that must power itself off showed, but for what firmware tells a terminal."""
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            output, _ = process.communicate(timeout=BOOT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        finally:
            process.kill()  # the test's own limit may be the first
    text = re.sub(r"\r|\x1b(c|\[[=0-9;?]*[A-Za-z])", "", output.decode(errors="replace"))
    assert process.returncode == 0, text
    assert "Power down" in text, text
    return text
