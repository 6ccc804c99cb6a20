"""The scenario suite's text, and what its proofs prove."""

from __future__ import annotations

import pytest

from tests.scenarios import proof, suite
from tests.scenarios.suite import Scenario, Transcript


def test_a_suite() -> None:
    text = b"# about\n\n=== one\necho a\n\necho b\n--- status 3\n--- stdout\na\n\nb\n\n=== two\nx\n"
    text += b"--- status 0\n--- stderr\nno\n"
    assert suite.parse(text) == (
        Scenario("one", b"echo a\n\necho b\n", Transcript(3, b"a\n\nb\n", b"")),
        Scenario("two", b"x\n", Transcript(0, b"", b"no\n")),
    )


@pytest.mark.parametrize(
    "text",
    [
        b"words\n",
        b"--- status 0\n",
        b"=== a\nx\n",
        b"=== a\nx\n--- status 0\n--- status 0\n",
        b"=== a\nx\n--- status 0\n=== a\nx\n--- status 0\n",
    ],
)
def test_no_suite(text: bytes) -> None:
    with pytest.raises(ValueError):
        suite.parse(text)


def test_every_scenario_says_where_it_ran() -> None:
    for scenario in suite.load():
        assert b"./proven " in scenario.script, scenario.name


def test_a_transcript_is_written_as_it_is_read() -> None:
    for scenario in suite.load():
        text = b"=== x\ny\n" + suite.write(scenario.golden).encode()
        assert suite.parse(text)[0].golden == scenario.golden


@pytest.mark.parametrize(
    ("line", "hypervisor"),
    [
        ("7.2\tUser Mode Linux\tKVMKVMKVM\t\t\t", "uml"),
        ("7.2\tAuthenticAMD\tKVMKVMKVM\t\t\t", "kvm"),
        ("7.2\tAuthenticAMD\tTCGTCGTCGTCG\t\t\t", "qemu"),
        ("7.2\tAuthenticAMD\tTCGTCGTCGTCG\tXenVMMXenVMM\txen\tPV", "xen"),
        ("7.2\tAuthenticAMD\tXenVMMXenVMM\t\txen\tPVH", "xen-pvh"),
        ("7.2\tAuthenticAMD\tXenVMMXenVMM\t\txen\tHVM", "another type of Xen's"),
        ("7.2\tAuthenticAMD\tTCGTCGTCGTCG\t\txen\tPV", "qemu"),
        ("7.2\tGenuineIntel\t\t\t\t", "unknown (no signature)"),
    ],
)
def test_what_a_guest_ran_on(line: str, hypervisor: str) -> None:
    (found,) = proof.parse(line + "\n")
    assert found.hypervisor() == hypervisor
