"""What a kept machine saves: runs on QEMU that boot, and runs that resume, in turns.

On the hypervisor that $APPPOT_HYPERVISOR names, kvm or qemu (emulation, the default here).
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from benchmarks.boot import ratios, timeline
from benchmarks.machines import APPPOT, IMAGE, Bench
from benchmarks.measure import Row, interleaved, launch, row

# Of the time of a boot, from the design.
SHARE = 1 / 3
GROUP = "warm start"


def measure(given: Bench) -> list[Row]:
    """Rows about cold and warm starts of the same run."""
    kind = os.environ.get("APPPOT_HYPERVISOR", "qemu")
    words = ("--hypervisor", kind, "--network", "none")
    kept = launch([APPPOT, "warm", *words, IMAGE], cwd=given.folder).seconds

    def run(choice: str) -> Mapping[str, float]:
        # The second of two in a row.  The first of a kind pays for what the other kind has left:
        # an emulated processor forgets what it has translated where memory gets another use.
        timeline(given.folder, *words, choice)
        return timeline(given.folder, *words, choice)

    subjects = {"cold": lambda: run("--no-warm"), "warm": lambda: run("--warm")}
    found = interleaved(subjects, given.rounds(5, 15))
    rows = [row(GROUP, f"`apppot warm`, once ({kind})", [kept], "s")]
    for case in ("whole", "hypervisor to payload"):
        cold, warm = found["cold"][case], found["warm"][case]
        rows += [
            row(GROUP, f"{case}, booted", cold, "s"),
            row(GROUP, f"{case}, resumed", warm, "s", base=cold, against="booted"),
            row(GROUP, f"{case}, as part of a boot's", ratios(warm, cold), "×", budget=SHARE),
        ]
    return rows
