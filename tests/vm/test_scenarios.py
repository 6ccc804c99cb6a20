"""The scenarios that every hypervisor must pass, on User-Mode Linux.

On KVM and Xen they run in the hypervisor lab: `make lab`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios import suite
from tests.scenarios.runner import Runner, build_proven
from tests.scenarios.suite import Scenario


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_proven(tmp_path_factory.mktemp("scenarios") / "proven")


@pytest.mark.parametrize("scenario", suite.load(), ids=lambda scenario: scenario.name)
def test_scenario(scenario: Scenario, proven: Path, place: Path) -> None:
    result = Runner("uml", place, proven).run(scenario)
    assert not result.problem, result.problem
    assert "Linux 7.2" in result.evidence


def test_another_hypervisor_shows(proven: Path, place: Path) -> None:
    """The control: a suite for KVM that ran on something else has not passed."""

    class Astray(Runner):
        def environment(self, own: Path) -> dict[str, str]:
            env = super().environment(own)
            return {**env, "RUN": env["RUN"].replace("--hypervisor kvm", "--hypervisor uml")}

    result = Astray("kvm", place, proven).run(suite.load()[0])
    assert result.problem == "this was not kvm but uml"
