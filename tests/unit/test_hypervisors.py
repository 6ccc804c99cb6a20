"""Which hypervisor is tried, and why not another; QEMU's words.  Starts nothing."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from apppot.guest import shares
from apppot.guest.protocol.job import Job
from apppot.host.capabilities.capabilities import Capabilities, limited
from apppot.host.common.errors import HypervisorError, Unsuited
from apppot.host.config import settings
from apppot.host.config.settings import Options, Setting
from apppot.host.hypervisor import qemu, verdicts, xen, xenguard, xennet
from apppot.host.hypervisor.base import Descriptors, HypervisorName, Share
from apppot.host.hypervisor.choice import KNOWN, candidates
from apppot.host.hypervisor.launchplan import LaunchPlan, placed
from apppot.host.hypervisor.qemu import Kvm, Qemu
from apppot.host.hypervisor.uml import Uml
from apppot.host.hypervisor.xen import Xen
from apppot.host.machine import fileserver
from apppot.host.plan.confinement import confinement_wish
from apppot.host.plan.request import Bind, Request

from tests.harness.plans import FOUND, HOST, IMAGE, plan

AUTO = Setting("auto", "default")
X86 = replace(FOUND, hypervisor=Qemu(HOST), kernel=replace(FOUND.kernel, features=frozenset()))
XEN = replace(X86, hypervisor=Xen(HOST))


def test_users_and_guests_know_the_same_names() -> None:
    assert {kind.name for kind in KNOWN} == set(HypervisorName)
    for name in HypervisorName:
        assert settings.resolve(Options(hypervisor=str(name)), {}, ()).hypervisor.value == name
    assert set(Share) == set(shares.KINDS)
    for share in Share:
        assert f'"share":"{share}"'.encode() in Job(share=share).dump()


def argv(made: LaunchPlan, hypervisor: Qemu, network: int | None = None) -> list[str]:
    return hypervisor.argv(made, "/view", "/tmp", Descriptors(9, network, 12))


def test_golden_argv() -> None:
    bind = Bind("/data", "/srv/data", True, False)
    made = plan(Request(IMAGE, (b"true",), binds=(bind,)), X86)
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


def without(*words: str) -> Capabilities:
    """The host, its QEMU without what the words name or end."""
    machines = HOST.qemu_machines - set(words)
    gone = {name for name in HOST.qemu_devices for word in words if word in name}
    return replace(HOST, qemu_machines=machines, qemu_devices=HOST.qemu_devices - gone)


def test_the_same_on_q35_with_pci_devices() -> None:
    hypervisor = Qemu(without("microvm"))
    made = plan(found=replace(X86, hypervisor=hypervisor))
    usual, words = argv(plan(found=X86), Qemu(HOST), 11), argv(made, hypervisor, 11)
    assert words[2] == "q35,accel=tcg,vmport=off,usb=off,sata=off,smbus=off"
    assert words[3:] == [
        word.replace("-device,", "-pci,").replace("netdev=net", "netdev=net,romfile=")
        for word in usual[3:]
    ]


MACHINES = (
    ((), "microvm", "9p", "eth0"),
    (("microvm",), "q35", "9p", "eth0"),
    (("virtio-blk-device",), "q35", "9p", "eth0"),
    # As Red Hat's, which has no 9p at all.
    (("microvm", "-device", "9p"), "q35", None, "eth0"),
    (("9p", "virtio-net"), "microvm", None, None),
    (("9p-device",), "q35", "9p", "eth0"),
)


@pytest.mark.parametrize(("missing", "machine", "share", "network"), MACHINES)
def test_the_machine_is_the_first_that_qemu_has_all_for(
    missing: tuple[str, ...], machine: str, share: str | None, network: str | None
) -> None:
    found = Qemu(without(*missing))
    assert found.verdict().usable
    assert (found.machine.name, found.share, found.network_device) == (machine, share, network)


def test_a_machine_and_a_file_server_that_are_asked_for() -> None:
    assert Qemu(limited(SERVED, "q35", "auto")).machine.name == "q35"
    assert [Qemu(limited(SERVED, "auto", one)).share for one in ("auto", "9p", "none")] == [
        "virtiofs", "9p", None
    ]  # fmt: skip
    assert Qemu(limited(HOST, "auto", "virtiofs")).share is None
    missing = Qemu(limited(without("q35"), "q35", "auto")).verdict()
    assert (missing.usable, missing.reason) == (
        False,
        "/usr/bin/qemu-system-x86_64 has no microvm and no q35",
    )


SERVED = replace(HOST, virtiofsd="/usr/libexec/virtiofsd")


@pytest.mark.parametrize("bus", ["device", "pci"])
def test_directories_by_virtiofs_share_the_guests_memory(bus: str) -> None:
    hypervisor = Qemu(SERVED if bus == "device" else limited(SERVED, "q35", "auto"))
    bind = Bind("/data", "/srv/data", True, False)
    made = plan(Request(IMAGE, (), binds=(bind,)), replace(X86, hypervisor=hypervisor))
    assert made.job.share == "virtiofs"
    words = hypervisor.argv(
        made, "/view", "/tmp", Descriptors(9, files=(("job", 20), ("bind0", 21)))
    )
    text = " ".join(words)
    assert "memory-backend-memfd,id=memory,size=524288K,share=on -machine memory-backend=m" in text
    for tag, server in (("bind0", 21), ("job", 20)):
        device = f"vhost-user-fs-{bus},chardev={tag},tag={tag}"
        assert f"-chardev socket,id={tag},fd={server} -device {device}" in text
    assert "9p" not in text


def test_huge_pages_that_a_file_server_reads_are_shared() -> None:
    room = replace(FOUND.room, huge=512 << 20, huge_page=2 << 20)
    hypervisor = Qemu(SERVED)
    made = plan(found=replace(X86, hypervisor=hypervisor, room=room))
    words = hypervisor.argv(made, "/view", "/tmp", Descriptors(9, files=(("job", 20),)))
    assert "memory-backend-memfd,id=memory,size=524288K,hugetlb=on,share=on" in words


def test_the_file_server_is_told_who_the_caller_is() -> None:
    words = fileserver.arguments("/view/job", True, 1234, 100)
    assert words == [
        *("--shared-dir", "/view/job", "--cache=never", "--allow-mmap", "--sandbox=none"),
        *("--no-announce-submounts", "--rlimit-nofile=0", "--log-level=warn"),
        *("--translate-uid", "squash-guest:0:1234:4294967295"),
        *("--translate-gid", "squash-guest:0:100:4294967295"),
    ]
    assert fileserver.arguments("/view/job", False, 1234, 100) == [*words, "--readonly"]


def test_a_machine_that_is_alone_has_no_file_server() -> None:
    assert (Qemu(SERVED).without_servers().share, Kvm(SERVED).without_servers().name) == (
        "9p",
        "kvm",
    )


def test_what_cannot_be_shown_is_copied_or_left_to_the_next() -> None:
    found = replace(X86, hypervisor=Qemu(without("9p")))
    made = plan(found=found)
    assert (made.job.job_copy, made.copied, made.returned) == (True, "/work/a job", "/work/a job")
    assert "qemu cannot show directories here" in made.warnings[0]
    assert plan(found=found, job_files="copy").warnings == ()
    bind = Bind("/data", "/srv/data", True, False)
    with pytest.raises(Unsuited, match="qemu cannot"):
        plan(Request(IMAGE, (), binds=(bind,)), found)
    with pytest.raises(Unsuited, match="qemu cannot share"):
        plan(found=found, job_files="share")
    with pytest.raises(Unsuited, match="qemu has no network"):
        plan(found=replace(X86, hypervisor=Qemu(without("virtio-net"))), network="user")


def test_huge_pages_where_the_host_has_enough() -> None:
    room = replace(FOUND.room, huge=512 << 20, huge_page=2 << 20)
    found = replace(X86, room=room)
    words = argv(plan(found=found), Qemu(HOST))
    assert "memory-backend-memfd,id=memory,size=524288K,hugetlb=on" in words
    for memory_asked in ("514M", "511M"):
        assert not plan(found=found, memory=memory_asked).huge


def test_several_processors() -> None:
    words = argv(plan(found=X86, cpus="2"), Qemu(HOST))
    assert words[words.index("-smp") + 1] == "2"


def test_shares_are_named_by_tag() -> None:
    made = plan(found=X86)
    job = placed(made.job, "/view")
    assert (job.share, job.job_dir, job.exchange) == ("9p", b"job", None)
    assert made.job.network is not None
    assert made.job.network.device == "eth0"


def test_a_cow_file_is_for_user_mode_linux_only() -> None:
    request = Request(None, (), cow=("/cow", "/image", 0))
    with pytest.raises(Unsuited, match="COW"):
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


REASONS: tuple[tuple[dict[str, object], str], ...] = (
    ({"qemu": None}, "not installed"),
    ({"qemu_version": (6, 2, 0)}, "QEMU 6.2.0 is too old"),
    ({"qemu_machines": frozenset()}, "has no microvm and no q35"),
    (
        {"qemu_devices": frozenset(("virtio-blk-device", "virtio-blk-pci", "virtserialport"))},
        "has no virtio-serial-device and no virtio-serial-pci",
    ),
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
    verdicts.remember(HypervisorName.KVM, "d1", "did not say HELLO")
    verdicts.remember(HypervisorName.KVM, "d2", "ended")
    assert verdicts.recall(HypervisorName.KVM, "d1") == "did not say HELLO"
    assert verdicts.recall(HypervisorName.KVM, "d2") == "ended"
    assert verdicts.recall(HypervisorName.UML, "d1") is None
    monkeypatch.setattr(verdicts, "boot_id", lambda: "another")
    assert verdicts.recall(HypervisorName.KVM, "d1") is None


# -- Xen -------------------------------------------------------------------------------------

BINDS = (
    Bind("/data", "/srv/data", True, False),
    Bind("/etc/motd", "/etc/motd", True, True),
)


def test_golden_configuration_of_a_domain() -> None:
    request = Request(IMAGE, (b"true",), binds=BINDS)
    made = plan(request, XEN, scratch="1G", xen_type="pvh")
    assert Xen(HOST).configuration(made, "/shm/apppot-0-1/view", "/shm/apppot-0-1/vm") == (
        """name = "apppot-0-1"
type = "pvh"
kernel = "/shm/apppot-0-1/view/kernel"
extra = "console=hvc0 quiet panic=-1 root=/dev/xvda ro rootfstype=ext4 init=/sbin/apppot-init \
apppot.drive=/dev/xvdb apppot.channel=/dev/hvc1"
memory = 512
vcpus = 1
on_poweroff = "preserve"
on_reboot = "preserve"
on_crash = "preserve"
disk = [
    "format=raw,vdev=xvda,access=ro,script=P/attach,target=P/xvda",
    "format=raw,vdev=xvdb,access=ro,script=P/attach,target=P/xvdb",
    "format=raw,vdev=xvdc,access=ro,script=P/attach,target=P/xvdc",
    "format=raw,vdev=xvdd,access=rw,script=P/attach,target=P/xvdd",
]
p9 = [
    "tag=bind0,path=P/bind0,security_model=none",
    "tag=bind1,path=P/bind1,security_model=none",
    "tag=job,path=P/job,security_model=none",
]
channel = [
    "connection=pty,name=dropped",
    "connection=socket,name=org.apppot.0,path=P/channel",
]
vif = [
    "script=P/attach",
]
""".replace("P/", "/shm/apppot-0-1/vm/")
    )


def test_the_guard_is_told_of_files_and_who_may_write() -> None:
    request = Request(IMAGE, (b"true",), binds=BINDS)
    made = plan(request, XEN)
    words = Xen(HOST).argv(made, "/view", "/run/apppot-0-1/vm", Descriptors(9, 11))
    assert words[2].endswith("/xenguard.py")
    assert words[3:5] == ["9", "11"]
    assert words[8:] == [
        *("disk", "ro", "/view/runtime", "xvda", "disk", "ro", "/view/run/drive", "xvdb"),
        *("disk", "ro", "/view/image0", "xvdc"),
        *("share", "ro", "/view/bind0", "bind0", "share", "ro", "/view/bind1/motd", "bind1"),
        *("share", "rw", "/view/job", "job"),
    ]


def test_a_domain_without_a_network() -> None:
    made = plan(found=XEN, network="none")
    words = Xen(HOST).argv(made, "/view", "/run/apppot-0-1/vm", Descriptors(9))
    assert words[4] == "-"
    assert "vif" not in Xen(HOST).configuration(made, "/view", "/run/apppot-0-1/vm")


def test_memory_of_a_domain_is_no_less_than_asked_for() -> None:
    made = plan(found=XEN, network="none", memory="100000K")
    assert "memory = 98\n" in Xen(HOST).configuration(made, "/view", "/run/a/vm")


def test_words_that_xl_cannot_read_are_refused() -> None:
    made = plan(Request(IMAGE, (), extra=('a="b"',)), XEN, network="none")
    with pytest.raises(HypervisorError, match="no way to write"):
        Xen(HOST).configuration(made, "/view", "/run/a/vm")


def test_what_xen_cannot_do_is_refused() -> None:
    with pytest.raises(Unsuited, match="many file systems"):
        plan(Request(None, (b"true",)), XEN, network="none")


def test_a_confinement_that_is_asked_for_rules_xen_out() -> None:
    def wish(wanted: str, hypervisor: Uml | Xen) -> str:
        return confinement_wish(wanted, hypervisor, host_image=False, uid=0, landlock=0)

    assert (wish("auto", Xen(HOST)), wish("auto", Uml(HOST))) == ("off", "auto")
    for wanted in ("required", "bubblewrap", "landlock"):
        assert wish(wanted, Uml(HOST)) == wanted
        with pytest.raises(Unsuited, match=f"--confine {wanted}"):
            wish(wanted, Xen(HOST))


@pytest.fixture
def dom0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dom0 with all that Xen needs, as files."""
    for name in ("privcmd", "loop-control", "qemu"):
        (tmp_path / name).touch()
    for tool in xen.TOOLS:
        (tmp_path / tool).touch(mode=0o755)
    (tmp_path / "capabilities").write_text("control_d\n")
    monkeypatch.setattr(xen, "CAPABILITIES", str(tmp_path / "capabilities"))
    monkeypatch.setattr(xen, "DEVICES", (str(tmp_path / "privcmd"), str(tmp_path / "loop-control")))
    monkeypatch.setattr(xen, "QEMUS", (str(tmp_path / "qem*"),))
    monkeypatch.setattr(xen, "USUAL_QEMU", str(tmp_path / "usual"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(xen, "_SEARCH", "")
    return tmp_path


def test_a_dom0_can_start_domains(dom0: Path) -> None:
    assert Xen(HOST).verdict().usable
    assert "xen" in [one.name for one in candidates(AUTO, HOST)]


XEN_REASONS = (
    ("capabilities", "not Xen's dom0"),
    ("xl", "no xl"),
    ("xenstore-watch", "no xenstore-watch"),
    ("qemu", "Xen's QEMU is missing"),
    ("privcmd", "cannot be opened by you"),
)


@pytest.mark.parametrize(("missing", "reason"), XEN_REASONS)
def test_what_a_dom0_lacks_is_said(dom0: Path, missing: str, reason: str) -> None:
    (dom0 / missing).unlink()
    with pytest.raises(HypervisorError, match=reason) as caught:
        candidates(Setting("xen", "--hypervisor"), HOST)
    assert caught.value.hint or missing == "capabilities"


@pytest.mark.parametrize("machines", [b"..pc..xenpv..", b"..pc..microvm.."])
def test_the_usual_qemu_counts_where_it_knows_xen(dom0: Path, machines: bytes) -> None:
    (dom0 / "qemu").unlink()
    (dom0 / "usual").write_bytes(machines)
    assert Xen(HOST).verdict().usable == (b"xenpv" in machines)


def test_a_guest_of_xen_is_no_dom0(dom0: Path) -> None:
    (dom0 / "capabilities").write_text("")
    assert "not Xen's dom0" in Xen(HOST).verdict().reason


def test_a_loop_device_is_configured_as_the_kernel_reads_it() -> None:
    packed = xenguard._LOOP_CONFIG.pack(3, 0, 5)
    # lo_flags comes after fd, block size, five 64-bit numbers and three of 32 bits.
    assert (len(packed), packed[:4], packed[60:64]) == (304, b"\3\0\0\0", b"\5\0\0\0")


@pytest.fixture
def line() -> Iterator[tuple[xenguard.Line, socket.socket, socket.socket]]:
    """The guard's line, the launcher and the guest at its ends."""
    launcher, to_launcher = socket.socketpair()
    guest, to_guest = socket.socketpair()
    watch, other = os.pipe()
    with launcher, to_launcher, guest, to_guest:
        yield (
            xenguard.Line(to_launcher.fileno(), to_guest.fileno(), watch, "guest", "/tty"),
            launcher,
            guest,
        )
    os.close(watch)
    os.close(other)


def test_nothing_is_sent_to_a_guest_that_has_not_spoken(
    line: tuple[xenguard.Line, socket.socket, socket.socket],
) -> None:
    guard, launcher, guest = line
    launcher.send(b"early")
    guest.send(b"hello")
    assert guard.turn()
    assert launcher.recv(99) == b"hello"
    with pytest.raises(BlockingIOError):
        guest.recv(99, socket.MSG_DONTWAIT)
    assert guard.turn()
    assert guest.recv(99) == b"early"


@pytest.mark.parametrize("gone", ["launcher", "guest"])
def test_the_guard_ends_with_either_end(
    line: tuple[xenguard.Line, socket.socket, socket.socket], gone: str
) -> None:
    guard, launcher, guest = line
    (launcher if gone == "launcher" else guest).close()
    assert not guard.turn()


def test_a_checksum_that_the_guest_left_open() -> None:
    """UDP from 10.0.2.100 to 10.0.2.3, of three bytes; its checksum by hand."""
    addresses = bytes([10, 0, 2, 100, 10, 0, 2, 3])
    pseudo = sum(struct.unpack("!4H", addresses)) + 17 + 11
    datagram = struct.pack("!4H", 1024, 53, 11, pseudo) + b"abc"
    taken = xennet._HEADER.pack(1, 0, 0, 0, 4, 6) + b"head" + datagram
    frame = xennet.completed(taken)
    assert (frame[:10], frame[12:]) == (b"head" + datagram[:6], b"abc")
    # A receiver's sum over all words, the checksum's too, is all ones.
    words = struct.unpack("!6H", frame[4:] + b"\0")
    total = sum(struct.unpack("!4H", addresses)) + 17 + 11 + sum(words)
    assert total % 0xFFFF == 0
    assert xennet.completed(xennet._HEADER.pack(0, 0, 0, 0, 4, 6) + frame) == frame
    assert xennet.completed(xennet._HEADER.pack(2, 0, 0, 0, 0, 0) + frame) == frame


@pytest.fixture
def network() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The network helper's end and the guest's of what carries frames."""
    helper, wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    guest, link = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with helper, guest:
        thread = threading.Thread(target=xennet.carry, args=(wire, link))
        thread.start()
        yield helper, guest
        helper.close()
        thread.join()
    wire.close()
    link.close()


def test_frames_both_ways(network: tuple[socket.socket, socket.socket]) -> None:
    helper, guest = network
    header = bytes(xennet._HEADER.size)
    helper.send(b"to the guest")
    assert guest.recv(99) == header + b"to the guest"
    # More than fits at once: what is not read yet waits, in order.
    sender = threading.Thread(target=lambda: [guest.send(header + b"%d" % n) for n in range(2000)])
    sender.start()
    assert [int(helper.recv(99)) for _ in range(2000)] == list(range(2000))
    sender.join()
