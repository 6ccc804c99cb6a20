"""Which hypervisor is tried, and why not another; QEMU's words.  Starts nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from apppot.host import planning
from apppot.host.config import Setting
from apppot.host.errors import HypervisorError
from apppot.host.hypervisor import candidates, memory, qemu
from apppot.host.hypervisor.base import Wires
from apppot.host.hypervisor.qemu import Kvm, Qemu
from apppot.host.plan import LaunchPlan
from plans import GROUND, HOST, IMAGE, plan

AUTO = Setting("auto", "default")
X86 = replace(GROUND, hypervisor=Qemu(HOST), kernel=replace(GROUND.kernel, features=frozenset()))


def argv(made: LaunchPlan, hypervisor: Qemu, network: int | None = None) -> list[str]:
    return hypervisor.argv(made, "/view", "/tmp", Wires(9, network, 12))


def test_golden_argv() -> None:
    bind = planning.Bind("/data", "/srv/data", True, False)
    made = plan(planning.Request(IMAGE, (b"true",), binds=(bind,)), X86)
    words = argv(made, Qemu(HOST), 11)
    assert words == [
        "/usr/bin/qemu-system-x86_64",
        *("-M", "microvm,accel=tcg,pit=on,pic=on,rtc=on", "-cpu", "max"),
        *("-m", "524288K", "-smp", "1"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-kernel", "/view/kernel", "-append",
        "console=ttyS0 quiet panic=-1 reboot=t tsc_early_khz=1000000 no_timer_check "
        "root=/dev/vda ro rootfstype=ext4 init=/sbin/apppot-init "
        "apppot.drive=/dev/vdb apppot.channel=/dev/vport0p1",
        *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-chardev", "socket,id=monitor,fd=12", "-mon", "chardev=monitor,mode=control"),
        *("-device", "virtio-serial-device,max_ports=2", "-chardev", "socket,id=channel,fd=9"),
        *("-device", "virtserialport,chardev=channel,name=org.apppot.0,nr=1"),
        *disk(0, "runtime"), *disk(1, "run/drive"), *disk(2, "image0"),
        *share("bind0", ",readonly=on"), *share("job", ""),
        *("-netdev", "dgram,id=net,local.type=fd,local.str=11"),
        *("-device", "virtio-net-device,netdev=net"),
    ]  # fmt: skip


def disk(number: int, name: str) -> list[str]:
    back = f"driver=raw,node-name=disk{number},read-only=on,file.driver=file"
    back += f",file.filename=/view/{name},file.locking=off"
    return ["-blockdev", back, "-device", f"virtio-blk-device,drive=disk{number}"]


def share(tag: str, mode: str) -> list[str]:
    back = f"local,id={tag},path=/view/{tag},security_model=none,multidevs=remap{mode}"
    return ["-fsdev", back, "-device", f"virtio-9p-device,fsdev={tag},mount_tag={tag}"]


def test_huge_pages_where_the_host_has_enough() -> None:
    room = replace(GROUND.room, huge=512 << 20, huge_page=2 << 20)
    ground = replace(X86, room=room)
    words = argv(plan(ground=ground), Qemu(HOST))
    assert "memory-backend-memfd,id=memory,size=524288K,hugetlb=on" in words
    for memory_asked in ("514M", "511M"):
        assert not plan(ground=ground, memory=memory_asked).huge


def test_shares_are_named_by_tag() -> None:
    made = plan(ground=X86)
    planning.place_paths(made.job, "/view")
    assert (made.job.share, made.job.job_dir, made.job.exchange) == ("9p", b"job", None)
    assert made.job.network is not None
    assert made.job.network.device == "eth0"


def test_a_cow_file_is_for_user_mode_linux_only() -> None:
    request = planning.Request(None, (), cow=("/cow", "/image", 0))
    with pytest.raises(planning.Unsuited, match="COW"):
        plan(request, X86)


@pytest.fixture
def kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device file that opens."""
    device = tmp_path / "kvm"
    device.touch()
    monkeypatch.setattr(qemu, "KVM_DEVICE", str(device))
    return device


def test_auto_tries_kvm_then_user_mode_linux_then_emulation(kvm: Path) -> None:
    assert [one.name for one in candidates(AUTO, HOST)] == ["kvm", "uml", "qemu"]
    kvm.unlink()
    assert [one.name for one in candidates(AUTO, HOST)] == ["uml", "qemu"]
    assert [one.name for one in candidates(AUTO, replace(HOST, qemu=None))] == ["uml"]


REASONS = (
    ({"qemu": None}, "not installed"),
    ({"qemu_version": (6, 2, 0)}, "QEMU 6.2.0 is too old"),
    ({"qemu_devices": HOST.qemu_devices - {"virtio-9p-device"}}, "has no virtio-9p-device"),
)


@pytest.mark.parametrize(("changes", "reason"), REASONS)
def test_what_is_asked_for_and_cannot_be_had_is_said(
    changes: dict[str, object], reason: str
) -> None:
    able = replace(HOST, **changes)  # type: ignore[arg-type]
    with pytest.raises(HypervisorError, match=reason) as caught:
        candidates(Setting("qemu", "--hypervisor"), able)
    assert caught.value.hint


def test_a_device_that_cannot_be_opened_is_said(kvm: Path) -> None:
    kvm.unlink()
    assert "there is no" in Kvm(HOST).verdict().reason


def test_silence_is_remembered_for_this_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory.remember("kvm", "d1", "did not say HELLO")
    memory.remember("kvm", "d2", "ended")
    assert memory.recall("kvm", "d1") == "did not say HELLO"
    assert memory.recall("kvm", "d2") == "ended"
    assert memory.recall("uml", "d1") is None
    monkeypatch.setattr(memory, "boot_id", lambda: "another")
    assert memory.recall("kvm", "d1") is None
