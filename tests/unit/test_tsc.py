"""The rate of the time stamp counter, which an emulated guest's clock stands on."""

from __future__ import annotations

import pytest
from apppot.host.capabilities import tsc


def test_two_measurements_agree() -> None:
    one, two = tsc.khz(), tsc.khz()
    if one is None or two is None:
        pytest.skip("this host lets nobody execute what was just written")
    assert one == pytest.approx(two, rel=1e-3)
    assert one > 100_000
