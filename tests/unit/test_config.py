"""Settings and where they come from; sizes, durations; what a console tells of a failure."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from apppot.host.channel import relay
from apppot.host.channel.outcome import checked_report
from apppot.host.common import units
from apppot.host.common.errors import UsageError
from apppot.host.config import settings
from apppot.host.machine import diagnosis

NOTHING = settings.Options()


def test_everything_that_is_set_can_be_asked_for() -> None:
    names = [
        [field.name for field in fields(kind)] for kind in (settings.Settings, settings.Options)
    ]
    assert names[0] == names[1]


def test_precedence(tmp_path: Path) -> None:
    site, mine = tmp_path / "site.toml", tmp_path / "mine.toml"
    site.write_text('memory = "1G"\ncpus = 3\nhostname = "site"\n')
    mine.write_text('memory = "2G"\ncpus = 4\n')
    env = {"APPPOT_MEM": "3G", "SLURM_CPUS_PER_TASK": "5"}
    got = settings.resolve(settings.Options(memory="4G"), env, (str(site), str(mine)))
    assert got.memory == settings.Setting(4 << 30, "--mem")
    got = settings.resolve(NOTHING, env, (str(site), str(mine)))
    assert got.memory == settings.Setting(3 << 30, "$APPPOT_MEM")
    assert got.cpus == settings.Setting(5, "batch allocation")
    got = settings.resolve(NOTHING, {}, (str(site), str(mine)))
    assert got.memory == settings.Setting(2 << 30, str(mine))
    assert got.hostname == settings.Setting("site", str(site))
    assert settings.resolve(NOTHING, {}).memory == settings.Setting(512 << 20, "default")


def test_batch_memory_leaves_room_for_the_launcher() -> None:
    got = settings.resolve(NOTHING, {"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_PER_TASK": "2"})
    assert got.memory.origin == "batch allocation"
    assert 1 << 30 < got.memory.value < 2 << 30


@pytest.mark.parametrize("text", ["nonsense = 1", "memory = ", 'memory = "much"', "cpus = true"])
def test_bad_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        settings.resolve(NOTHING, {}, (str(tmp_path / "c.toml"),))
    assert "c.toml" in caught.value.cause


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20), ("4G", 4 << 30), ("1.5g", 3 << 29), ("64MiB", 64 << 20),
        ("10kb", 10 << 10), ("1T", 1 << 40), ("77", 77), (" 5M ", 5 << 20),
    ],
)  # fmt: skip
def test_size(text: str, size: int) -> None:
    assert units.parse_size(text) == size


def test_size_without_a_unit() -> None:
    assert units.parse_size("512", "M") == 512 << 20


@pytest.mark.parametrize("text", ["", "M", "-1G", "0", "1X", "1 2", "nan", "inf", "1e30G"])
def test_bad_size(text: str) -> None:
    with pytest.raises(UsageError):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("2d", 172800), ("0.5", 0.5),
        ("01:30:00", 5400), ("2:30", 150), ("1-00:00:00", 86400),
    ],
)  # fmt: skip
def test_duration(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5", "0", "5x", "1:x", "nan"])
def test_bad_duration(text: str) -> None:
    with pytest.raises(UsageError):
        units.parse_duration(text)


def test_heartbeat_limit() -> None:
    assert relay.heartbeat_limit({}) == 30
    assert relay.heartbeat_limit({"APPPOT_HEARTBEAT_LIMIT": "5s"}) == 5
    assert relay.heartbeat_limit({"APPPOT_HEARTBEAT_LIMIT": "0.1"}) == 2
    with pytest.raises(UsageError, match="APPPOT_HEARTBEAT_LIMIT"):
        relay.heartbeat_limit({"APPPOT_HEARTBEAT_LIMIT": "x"})


@pytest.mark.parametrize(
    "report",
    [
        {}, [], None, 5, "x", {"status": None}, {"status": "0"}, {"status": True},
        {"status": -1}, {"status": 1 << 16}, {"errno": 1.5},
    ],
)  # fmt: skip
def test_exit_of_a_hostile_guest(report: object) -> None:
    with pytest.raises(ValueError):
        checked_report(report)


def test_exit() -> None:
    assert checked_report({"status": 0}) == {"status": 0}
    assert checked_report({"status": None, "errno": 2, "what": "x"})["errno"] == 2


@pytest.mark.parametrize(
    ("console", "meaning"),
    [
        ("UML ran out of memory on the host side! vm.max_map_count", "vm.max_map_count"),
        ("VFS: Cannot open root device", "runtime"),
        ("Kernel panic - not syncing: sysrq triggered crash\n", "sysrq triggered crash"),
        (
            "xc_dom_boot_mem_init: can't allocate low memory for domain: Out of memory",
            "Xen has not",
        ),
        ("System is deadlocked on memory", "too little memory"),
        ("Checking PROT_EXEC mmap in /tmp...Operation not permitted", "noexec"),
    ],
)
def test_diagnosis(console: str, meaning: str) -> None:
    assert meaning in diagnosis.diagnose(f"first\n{console}\nlast")[0]


def test_nothing_to_diagnose() -> None:
    assert diagnosis.diagnose("all is well") == ("", "")


def test_last_lines() -> None:
    text = "\n".join(["one", " [<6001f0a0>] do_x+0x1", "\x1b[31mred\x07", "", *map(str, range(20))])
    assert diagnosis.last_lines(text)[-1] == "19"
    assert len(diagnosis.last_lines(text)) == 12
    panic = f"{text}\nKernel panic - not syncing: test\n" + "\n".join(["trace"] * 30)
    assert diagnosis.last_lines(panic)[0] == "Kernel panic - not syncing: test"
    assert diagnosis.last_lines(f"{text}\nKernel panic - short")[-1] == "Kernel panic - short"
    assert diagnosis.last_lines(text, 30)[:2] == ["one", "[31mred"]
