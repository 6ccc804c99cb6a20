"""Runs scenarios on one hypervisor, without a fall-back, against their golden transcripts."""

from __future__ import annotations

import difflib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from apppot.host.common import paths

from tests.scenarios import proof
from tests.scenarios.suite import Scenario, Transcript, write

IMAGE = "debian-12"
HYPERVISORS = ("uml", "kvm", "xen", "xen-pvh", "qemu")
PROVEN_SOURCE = Path(__file__).parent / "proven.c"
_LAUNCHER = (
    f"#!/bin/sh\nexec {sys.executable} -c 'from apppot.host.cli import main; main()' \"$@\"\n"
)


@dataclass(frozen=True)
class Result:
    """What came of one scenario.  `problem` is empty where all was as it must be."""

    name: str
    seconds: float
    problem: str
    evidence: str


def build_proven(target: Path) -> Path:
    """Compile the program that looks around from inside; static, since images differ."""
    words = ["gcc", "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o"]
    subprocess.run([*words, str(target), str(PROVEN_SOURCE)], check=True)
    return target


class Runner:
    """Runs scenarios below `place`, each in a directory of its own.

    `limit` is the time in seconds that one scenario may take; `image` a name or a path.
    """

    def __init__(
        self,
        hypervisor: str,
        place: Path,
        proven: Path,
        limit: float = 60.0,
        image: str = IMAGE,
    ) -> None:
        self.hypervisor, self.place, self.proven, self.limit = hypervisor, place, proven, limit
        self.image = image
        (place / "bin").mkdir()
        launcher = place / "bin" / "apppot"
        launcher.write_text(_LAUNCHER)
        launcher.chmod(0o755)

    def environment(self, own: Path) -> dict[str, str]:
        """The caller's pot and images, nothing else of what he has configured or kept."""
        kept = {key: value for key, value in os.environ.items() if key in _KEPT}
        name, _, xen_type = self.hypervisor.partition("-")
        return {
            "APPPOT_SITE_STORE": paths.data_home(),
            "APPPOT_POT": paths.pot_home(),
            **kept,
            "PATH": f"{self.place}/bin:{os.environ['PATH']}",
            "LC_ALL": "C.UTF-8",
            "HOME": str(own),
            **{f"XDG_{kind}_HOME": f"{own}/{kind.lower()}" for kind in ("DATA", "STATE", "CONFIG")},
            "XDG_CACHE_HOME": str(Path(paths.cache_home()).parent),
            "IMAGE": self.image,
            "RUN": f"apppot run --hypervisor {name} --network none",
            "APPPOT_XEN_TYPE": xen_type or "pv",
        }

    def run(self, scenario: Scenario) -> Result:
        own = Path(tempfile.mkdtemp(dir=self.place))
        work = own / "work"
        work.mkdir()
        shutil.copy(self.proven, work / "proven")
        began = time.monotonic()
        seen, ended = _run_shell(scenario.script, work, self.environment(own), self.limit)
        seconds = time.monotonic() - began
        proofs = work / "proofs"
        noted = proof.parse(proofs.read_text()) if proofs.exists() else []
        problem = "" if ended else "it did not end in time\n"
        problem += _difference(scenario.golden, seen) or self._doubt(noted)
        evidence = "; ".join(sorted({item.evidence() for item in noted}))
        shutil.rmtree(own)
        return Result(scenario.name, seconds, problem, evidence)

    def _doubt(self, noted: Iterable[proof.Proof]) -> str:
        """Why it is not proven that all guests ran on this hypervisor, or ""."""
        found = {item.hypervisor() for item in noted}
        if found == {self.hypervisor}:
            return ""
        return f"this was not {self.hypervisor} but {', '.join(sorted(found)) or 'nothing'}"


# What a slow machine, or a place without the usual stores, may say.
_KEPT = (
    *("APPPOT_HELLO_TIMEOUT", "APPPOT_HEARTBEAT_LIMIT", "APPPOT_POT", "APPPOT_SITE_STORE"),
    *("APPPOT_QEMU_MACHINE", "APPPOT_QEMU_SHARE"),
    *("APPPOT_CONFINE", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "TMPDIR", "XDG_RUNTIME_DIR"),
)


def _run_shell(
    script: bytes, work: Path, env: Mapping[str, str], limit: float
) -> tuple[Transcript, bool]:
    """What a script for the shell left, and whether it ended by itself in time."""
    process = subprocess.Popen(
        ["sh", "-c", os.fsdecode(script)],
        cwd=work,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        return Transcript(124, stdout, stderr), False
    return Transcript(process.returncode, stdout, stderr), True


def _difference(golden: Transcript, seen: Transcript) -> str:
    """How a transcript differs from the golden one, as lines, or ""."""
    if seen == golden:
        return ""
    wanted, got = write(golden).splitlines(), write(seen).splitlines()
    lines = list(difflib.unified_diff(wanted, got, "golden", "seen", lineterm="", n=1))
    return "\n".join(lines[:60]) or f"{golden} became {seen}"


def table(results: Iterable[Result]) -> str:
    """The results as text, one line a scenario, what went wrong below it."""
    lines = []
    for result in results:
        verdict = "FAIL" if result.problem else "pass"
        lines.append(f"{verdict}  {result.seconds:6.1f} s  {result.name:<44}  {result.evidence}")
        lines += [f"      | {line}" for line in result.problem.splitlines()]
    return "\n".join(lines) + "\n"
