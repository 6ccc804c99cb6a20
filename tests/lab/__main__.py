"""`python -m tests.lab`: the scenario suite on real KVM and real Xen, and a table of results.

With `--script`, run something else in a lab, for instance a shell's line by hand.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from apppot.host import paths
from apppot.host.hypervisor import KNOWN

from tests.lab import guest, image
from tests.lab.image import ROOT, Parts
from tests.lab.machine import KEPT, Kind, Lab, LabError, fingerprint
from tests.lab.report import Column, table
from tests.scenarios import suite
from tests.scenarios.runner import Result, build_proven

UP_SECONDS = 600
# Two levels of emulation on a machine that others use too.
SCENARIO_SECONDS = 900
SUITE = """
cd /lab/tree
export PYTHONPATH=/lab/tree/tests/typeroot PYTHONPYCACHEPREFIX=/tmp/compiled
export APPPOT_POT=/lab/pot APPPOT_SITE_STORE=/lab/site XDG_CACHE_HOME=/tmp/cache
export APPPOT_HELLO_TIMEOUT=10m APPPOT_HEARTBEAT_LIMIT=10m
# The root's overlay has no files without a name, which disks of guests are.
mkdir -p /tmp/memory
mount -t tmpfs -o size=2G,mode=1777 memory /tmp/memory
export TMPDIR=/tmp/memory
exec {who} python3 -m tests.scenarios --hypervisor {kind} --limit {limit} \
    --proven /lab/exchange/proven --json /lab/exchange/results.json {names}
"""
# What guests must not leave behind.
LEFT = {
    Kind.KVM: "pgrep -a qemu-system; ls -d /dev/shm/apppot-* /tmp/apppot-*",
    Kind.XEN: (
        "xl list | tail -n +3; losetup -a; ls -d /run/apppot-xen/* /dev/shm/apppot-* /tmp/apppot-*"
    ),
}
# Xen's tools are root's; QEMU with KVM is anybody's.
WHO = {Kind.KVM: "setpriv --reuid 1000 --regid 1000 --clear-groups", Kind.XEN: ""}


def shares() -> dict[str, Path]:
    """What a lab sees of the host, read-only."""
    return {"tree": ROOT, "pot": Path(paths.pot_home()), "site": Path(paths.data_home())}


def saved_state(kind: Kind, parts: Parts) -> Path:
    """The state of a lab that is up, made where it is missing: starting from it takes a second."""
    state = parts.kernel.parent / f"{kind}-{fingerprint(kind, parts, shares())}.state"
    if not state.exists():
        sys.stderr.write(f"booting the {kind} lab …\n")
        with Lab(kind, parts, shares(), limit=UP_SECONDS) as lab:
            lab.save(state)
    return state


def start(kind: Kind, parts: Parts) -> Lab:
    return Lab(kind, parts, shares(), limit=UP_SECONDS, saved=saved_state(kind, parts))


def run_suite(kind: Kind, parts: Parts, names: list[str]) -> Column:
    """Check the lab with a guest of its own, then run the suite in it."""
    began = time.monotonic()
    with start(kind, parts) as lab:
        lab.exchange.chmod(0o777)
        build_proven(lab.exchange / "proven")
        checked = guest.check(lab, parts)
        if kind not in {known.name for known in KNOWN}:
            return Column(kind, checked, "not built yet", (), time.monotonic() - began)
        words = " ".join(shlex.quote(name) for name in names)
        script = SUITE.format(who=WHO[kind], kind=kind, limit=SCENARIO_SECONDS, names=words)
        scenarios = len(names) or len(suite.load())
        status = lab.run(script, limit=scenarios * SCENARIO_SECONDS)
        results = lab.exchange / "results.json"
        if not results.exists():
            return Column(kind, checked, f"status {status}", (), time.monotonic() - began)
        found = tuple(Result(**fields) for fields in json.loads(results.read_text()))
        left = bytearray()
        lab.run(f"({LEFT[kind]}) 2>/dev/null", UP_SECONDS, left.extend)
        trouble = f"left behind:\n{left.decode(errors='replace')}" if left else ""
        return Column(kind, checked, trouble, found, time.monotonic() - began)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab")
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help="only these")
    parser.add_argument("--only", type=Kind, choices=list(Kind), help="this lab, not all of them")
    parser.add_argument("--script", help="run this in the lab instead of the suite")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    asked = parser.parse_args()
    kinds = [asked.only] if asked.only else list(Kind)
    parts = image.build()
    if asked.script is not None:
        with start(kinds[0], parts) as lab:
            return lab.run(asked.script, limit=3600)
    columns = []
    for kind in kinds:
        try:
            columns.append(run_suite(kind, parts, asked.names))
        except LabError as error:
            columns.append(Column(kind, "", f"{error}\n  the console is in {KEPT}", (), 0.0))
    sys.stdout.write(table(columns))
    if asked.json is not None:
        asked.json.write_text(json.dumps([column.fields() for column in columns], indent=1) + "\n")
    return 0 if all(column.passed() for column in columns) else 1


if __name__ == "__main__":
    sys.exit(main())
