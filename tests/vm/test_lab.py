"""Real KVM and real Xen, in the hypervisor lab: a handful of scenarios; `make lab` runs all."""

from __future__ import annotations

import shutil

import pytest

from tests.lab import image
from tests.lab.machine import QEMU, Kind
from tests.lab.report import table
from tests.lab.trial import run_suite

CHOSEN = {
    Kind.KVM: ("exit status", "job directory", "crash of the guest", "network"),
    Kind.XEN: (
        *("exit status", "crash of the guest", "network"),
        "a guest that powers itself off while it writes",
    ),
    Kind.XEN_PVH: ("a guest that powers itself off",),
}


# On a bare machine the lab's disk is built and each lab boots first.
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which(QEMU) is None, reason="QEMU is not installed")
@pytest.mark.parametrize("kind", CHOSEN)
def test_scenarios(kind: Kind) -> None:
    column = run_suite(kind, image.build(), CHOSEN[kind])
    assert column.passed(), table([column])
    assert {result.name for result in column.results} == set(CHOSEN[kind])
    assert all("Linux 7.2" in result.evidence for result in column.results)
