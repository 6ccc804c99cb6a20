"""The pot as one file: made here, used where nothing can be built."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from apppot.host.pot import layout

from tests.harness.vm import IMAGE, RELEASE, Launcher

_PT_INTERP = 3


def test_the_kernel_needs_no_library_of_the_host() -> None:
    """A static program runs on any distribution, however old its C library."""
    head = Path(layout.find_pot().kernel.path).read_bytes()[:4096]
    (offset,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    kinds = [struct.unpack_from("<I", head, offset + size * n)[0] for n in range(count)]
    assert head[:4] == b"\x7fELF"
    assert _PT_INTERP not in kinds


def tool(apppot: Launcher, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*apppot.who.command, *words],
        env={**apppot.environment(), **env},
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.mark.timeout(180)
def test_exported_imported_and_run(apppot: Launcher, place: Path) -> None:
    file, elsewhere = place / "pot.tar", {"APPPOT_POT": str(place / "pot")}
    assert tool(apppot, "pot", "export", str(file), env={}).returncode == 0
    assert apppot(IMAGE, "true", env=elsewhere).status == 125
    done = tool(apppot, "pot", "import", str(file), env=elsewhere)
    assert done.returncode == 0, done.stderr
    result = apppot("--network", "none", IMAGE, "uname", "-r", env=elsewhere)
    assert result.ok().decode().startswith(RELEASE)


def test_a_damaged_file_leaves_the_pot_as_it_was(apppot: Launcher, place: Path) -> None:
    file, elsewhere = place / "pot.tar", {"APPPOT_POT": str(place / "pot")}
    assert tool(apppot, "pot", "export", str(file), env={}).returncode == 0
    os.truncate(file, file.stat().st_size // 2)
    done = tool(apppot, "pot", "import", str(file), env=elsewhere)
    assert done.returncode == 125
    assert b"remedy" in done.stderr
    assert not (place / "pot" / "pot.json").exists()
