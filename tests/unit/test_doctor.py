"""The doctor's verdicts, from made-up machines."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.capabilities.memory import Memory
from apppot.host.commands import doctor as command
from apppot.host.commands.table import build_parser
from apppot.host.config.settings import Setting, Settings
from apppot.host.doctor import checks as doctor
from apppot.host.doctor.checks import Check, Mark
from apppot.host.doctor.facts import Facts, Place
from apppot.host.hypervisor.base import HypervisorName, Verdict
from apppot.host.pot.layout import Kernel
from apppot.host.runs.timeline import Step

from tests.harness.plans import HOST

GIB = 1 << 30
TUNED = Kernel("/pot/linux", "7.2.12", "d" * 64, True, frozenset(["seccomp", "ncpus"]), None)
STOCK = Kernel("/usr/bin/linux.uml", "6.1.12", "e" * 64, False, frozenset(), "/usr/lib/uml/modules")
ABLE = Capabilities(
    bwrap="/usr/bin/bwrap",
    bwrap_reason="",
    landlock=7,
    slirp="/usr/bin/slirp4netns",
    max_map_count=65530,
)
GOOD = Facts(
    root=False,
    hypervisor=Setting("auto", "default"),
    verdicts=((HypervisorName.UML, Verdict(True, "needs nothing of the host")),),
    kernel=TUNED,
    kernel_problem="",
    stale_kernel=False,
    x86_kernel="7.2.12",
    x86_kernel_problem="",
    stale_x86_kernel=False,
    lpj=28_000_000,
    runtime="/pot/runtime.ext4",
    runtime_problem="",
    stale_runtime=False,
    capabilities=ABLE,
    setpriv=True,
    user_namespaces="",
    confine=Setting("auto", "default"),
    memory=Setting(512 << 20, "default"),
    room=Memory(8 * GIB, 6 * GIB, "the host"),
    memory_place=("/dev/shm", ""),
    shm=Place("/dev/shm", "tmpfs", 4 * GIB, True),
    run_place=Place("/run/user/1000", "tmpfs", 800 << 20, True),
    cpus=(0, 1),
    free_cpus=(1,),
    store=Place("/home/jane/.local/share", "ext4", 50 * GIB, True),
    images=("debian-12:1",),
    missing_tools=(("kernel build", (), ""), ("image build", (), "")),
)
NO_X86_KERNEL = {
    "x86_kernel": None,
    "x86_kernel_problem": "there is no x86-64 kernel in the pot /pot\n  remedy: build it",
}
NO_BWRAP = dataclasses.replace(ABLE, bwrap=None, bwrap_reason="bubblewrap is not installed")
UNHELD = dataclasses.replace(NO_BWRAP, landlock=0)


def machine(**changes: Any) -> Facts:
    """A good machine but for `changes`."""
    return dataclasses.replace(GOOD, **changes)


def verdicts(facts: Facts) -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(facts)}


def test_good_machine_has_nothing_to_mend() -> None:
    checks = doctor.examine(GOOD)
    assert [check for check in checks if check.mark is not Mark.OK or check.remedy] == []
    assert doctor.usable(checks)


def qemu(*, usable: bool = True) -> tuple[tuple[HypervisorName, Verdict], ...]:
    verdict = Verdict(usable, "fine" if usable else "QEMU 6.2 is too old", "newer")
    return (*GOOD.verdicts, (HypervisorName.QEMU, verdict))


def without(word: str) -> Capabilities:
    """A host whose QEMU has no devices of that name."""
    devices = frozenset(name for name in HOST.qemu_devices if word not in name)
    return dataclasses.replace(HOST, qemu_devices=devices)


def test_what_qemu_gives_is_said() -> None:
    served = dataclasses.replace(without("-device"), virtiofsd="/usr/libexec/virtiofsd")
    check = verdicts(machine(verdicts=qemu(), capabilities=served))["QEMU"]
    assert (check.mark, check.reason) == (Mark.OK, "7.2.22, q35, directories by virtiofs")


CASES: list[tuple[str, dict[str, Any], Mark, str]] = [
    ("hypervisor", {"hypervisor": Setting("kvm", "$APPPOT_HYPERVISOR")}, Mark.FAIL, "kvm"),
    (
        "hypervisor",
        {"verdicts": ((HypervisorName.UML, Verdict(False, "needs x86_64")),)},
        Mark.FAIL,
        "x86_64",
    ),
    ("kernel", {"kernel": STOCK}, Mark.WARN, "6.1.12"),
    ("kernel", {"kernel": None, "kernel_problem": "none\n  remedy: build"}, Mark.FAIL, "none"),
    ("kernel", {"stale_kernel": True}, Mark.WARN, "another recipe"),
    ("x86-64 kernel", {"stale_x86_kernel": True}, Mark.WARN, "another recipe"),
    ("x86-64 kernel", NO_X86_KERNEL, Mark.WARN, "neither KVM nor Xen nor QEMU"),
    ("runtime", {"stale_runtime": True}, Mark.WARN, "not this version"),
    ("calibration", {"lpj": None}, Mark.WARN, "not measured"),
    ("runtime", {"runtime": None, "runtime_problem": "gone\n  remedy: x"}, Mark.FAIL, "gone"),
    ("confinement", {"capabilities": UNHELD}, Mark.WARN, "not installed"),
    ("confinement", {"confine": Setting("off", "$APPPOT_CONFINE")}, Mark.WARN, "$APPPOT_CONFINE"),
    (
        "confinement",
        {"capabilities": UNHELD, "confine": Setting("required", "site")},
        Mark.FAIL,
        "not installed",
    ),
    ("confinement", {"root": True, "setpriv": False}, Mark.FAIL, "setpriv"),
    ("user namespaces", {"user_namespaces": "not permitted"}, Mark.WARN, "not permitted"),
    ("memory", {"memory": Setting(9 * GIB, "--mem")}, Mark.FAIL, "9.0 GiB"),
    ("memory", {"memory": Setting(7 * GIB, "--mem")}, Mark.WARN, "free now"),
    ("/dev/shm", {"shm": None}, Mark.WARN, "none"),
    ("cpus", {"free_cpus": ()}, Mark.WARN, "not pinned"),
    ("network", {"capabilities": dataclasses.replace(ABLE, slirp=None)}, Mark.WARN, "slirp4netns"),
    (
        "network",
        {"capabilities": dataclasses.replace(ABLE, slirp=None, qemu_user_network=True)},
        Mark.WARN,
        "only guests of QEMU and KVM",
    ),
    ("QEMU", {"verdicts": qemu(usable=False)}, Mark.WARN, "too old: no KVM either"),
    ("QEMU", {"verdicts": qemu(), "capabilities": without("9p")}, Mark.WARN, "is copied"),
    ("QEMU", {"verdicts": qemu(), "capabilities": without("-net-")}, Mark.WARN, "network devices"),
    ("run directory", {"run_place": None}, Mark.FAIL, "no place"),
    ("store", {"store": Place("/home", "ext4", 1 << 20, True)}, Mark.WARN, "1.0 MiB"),
    ("images", {"images": ()}, Mark.WARN, "none yet"),
]


@pytest.mark.parametrize(("name", "changes", "mark", "word"), CASES)
def test_trouble_is_named_with_a_remedy(
    name: str, changes: dict[str, Any], mark: Mark, word: str
) -> None:
    facts = machine(**changes)
    check = verdicts(facts)[name]
    assert (check.mark, word in check.reason) == (mark, True), check
    assert check.remedy or name == "hypervisor"
    assert doctor.usable(doctor.examine(facts)) is (mark is not Mark.FAIL)


@pytest.mark.parametrize(
    ("place", "mark"),
    [
        (("/dev/shm", ""), Mark.OK),
        (("/tmp", "the guest's memory lies on a disk (/tmp)"), Mark.WARN),
        ((None, "no place"), Mark.FAIL),
    ],
)
def test_memory_without_bubblewrap_needs_a_fit_place(
    place: tuple[str | None, str], mark: Mark
) -> None:
    facts = machine(capabilities=NO_BWRAP, memory_place=place)
    assert verdicts(facts)["memory place"].mark is mark
    assert verdicts(machine(memory_place=place))["memory place"].mark is Mark.OK


def test_landlock_says_what_it_cannot_hold() -> None:
    check = verdicts(machine(capabilities=NO_BWRAP))["confinement"]
    assert check.mark is Mark.OK
    assert "bubblewrap is not installed" in check.reason
    assert "stay visible" in check.reason
    assert "signals" not in check.reason
    asked = machine(confine=Setting("landlock", "--confine"))
    assert "stay visible" in verdicts(asked)["confinement"].reason
    old = dataclasses.replace(NO_BWRAP, landlock=3)
    assert "signals" in verdicts(machine(capabilities=old))["confinement"].reason


def test_map_count_matters_only_to_a_kernel_without_the_patches() -> None:
    large = Setting(4 * GIB, "--mem")
    assert verdicts(machine(memory=large))["vm.max_map_count"].mark is Mark.OK
    check = verdicts(machine(memory=large, kernel=STOCK))["vm.max_map_count"]
    assert check.mark is Mark.WARN
    assert "sysctl vm.max_map_count=2097152" in check.remedy
    small = Setting(200 << 20, "--mem")
    assert verdicts(machine(memory=small, kernel=STOCK))["vm.max_map_count"].mark is Mark.OK


def test_root_needs_no_user_namespaces() -> None:
    facts = machine(root=True, user_namespaces="not permitted")
    assert verdicts(facts)["user namespaces"].mark is Mark.OK


def test_build_tools_of_what_is_built_are_not_missed() -> None:
    missing = (("kernel build", ("flex",), "apt-get install flex"),)
    assert verdicts(machine(missing_tools=missing))["tools: kernel build"].mark is Mark.OK
    check = verdicts(machine(missing_tools=missing, kernel=STOCK))["tools: kernel build"]
    assert (check.mark, check.remedy) == (Mark.WARN, "apt-get install flex")


def test_text_is_plain_or_coloured() -> None:
    checks = [Check("kernel", Mark.FAIL, "there is none", "build it"), Check("cpus", Mark.OK, "2")]
    plain = command.as_text(checks, [], colour=False)
    assert plain.splitlines()[0].split() == ["fail", "kernel", "there", "is", "none"]
    assert "remedy: build it" in plain
    assert plain.endswith("a guest cannot run here (failures: 1, warnings: 0)\n")
    assert "\033" not in plain
    assert "\033[31mfail" in command.as_text(checks, [], colour=True)


def test_json_holds_verdicts_and_timeline() -> None:
    steps = [Step("kernel", "kernel", 0.01, 0.05)]
    data = json.loads(json.dumps(command.as_data(doctor.examine(GOOD), steps)))
    assert data["usable"] is True
    assert {row["verdict"] for row in data["checks"]} == {"ok"}
    assert data["timeline"] == [["kernel", "kernel", 0.01, 0.05]]
    assert "timeline" not in command.as_data([], [])


def test_exit_status_says_whether_a_guest_can_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = build_parser("doctor").parse_args(["doctor", "--json"])
    monkeypatch.setattr("apppot.host.doctor.facts.gather", lambda settings: GOOD)
    assert command.main(args) == 0
    assert json.loads(capsys.readouterr().out)["usable"] is True
    monkeypatch.setattr("apppot.host.doctor.facts.gather", lambda settings: machine(runtime=None))
    assert command.main(args) == 125


def test_memory_option_reaches_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def gather(settings: Settings) -> Facts:
        seen.append(settings.memory.value)
        return GOOD

    monkeypatch.setattr("apppot.host.doctor.facts.gather", gather)
    command.main(build_parser("doctor").parse_args(["doctor", "--mem", "3G"]))
    assert seen == [3 * GIB]
