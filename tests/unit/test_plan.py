"""From a request to a plan to the hypervisor's words: golden, without starting anything."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from apppot.guest.protocol.job import Job
from apppot.host.commands.options import parse_bind, parse_forward
from apppot.host.common.errors import UsageError
from apppot.host.hypervisor.base import Descriptors
from apppot.host.hypervisor.launchplan import LaunchPlan, NetworkHelper, NetworkKind, placed
from apppot.host.hypervisor.qemu import Kvm, Qemu
from apppot.host.hypervisor.uml import Uml
from apppot.host.hypervisor.xen import Xen
from apppot.host.images.probe import ImageFormat, Probed
from apppot.host.images.record import Image, Record
from apppot.host.plan import planner
from apppot.host.plan.inherited import HOST_HIDDEN, hidden_of_host
from apppot.host.plan.request import Bind, Request

from tests.harness.plans import CALLER, COMMAND, FOUND, HOST, IMAGE, KERNEL, UML, plan, settings


def argv(made: LaunchPlan) -> list[str]:
    return UML.argv(made, "/view", "/tmp", Descriptors(9))


def test_golden_argv() -> None:
    assert argv(plan()) == [
        "/view/kernel", "mem=524288K",
        "ubd0rsc=/view/runtime", "ubd1rsc=/view/run/drive", "ubd2rsc=/view/image0",
        "root=/dev/ubda", "ro", "rootfstype=ext4", "init=/sbin/apppot-init",
        "con=null", "con0=null,fd:2", "ssl0=fd:9", "ssl=null", "uml_dir=/tmp/", "umid=vm",
        "vec0:transport=bess,dst=/view/net/bess.sock,depth=64,gro=1,mtu=1500",
        "seccomp=on", "lpj=29581312", "apppot.drive=/dev/ubdb", "apppot.channel=/dev/ttyS0",
    ]  # fmt: skip


def test_golden_argv_of_a_stock_kernel() -> None:
    stock = replace(KERNEL, tuned=False, features=frozenset(), lpj=None)
    words = argv(plan(found=replace(FOUND, kernel=stock), network="none", memory="64M"))
    assert words == [
        "/view/kernel", "mem=65536K",
        "ubd0rsc=/view/runtime", "ubd1rsc=/view/run/drive", "ubd2rsc=/view/image0",
        "root=/dev/ubda", "ro", "rootfstype=ext4", "init=/sbin/apppot-init",
        "con=null", "con0=null,fd:2", "ssl0=fd:9", "ssl=null", "uml_dir=/tmp/", "umid=vm",
        "apppot.drive=/dev/ubdb", "apppot.channel=/dev/ttyS0",
    ]  # fmt: skip


def test_cpus() -> None:
    assert "ncpus=2" in argv(plan(cpus="2"))
    stock = replace(KERNEL, features=frozenset())
    with pytest.raises(UsageError, match="one CPU"):
        plan(found=replace(FOUND, kernel=stock), cpus="2")


def test_job() -> None:
    job = plan().job
    assert job.argv == list(COMMAND)
    assert job.env == {b"LANG": b"C.UTF-8"}
    assert (job.uid, job.gid, job.umask) == (1234, 100, 0o027)
    # In a user namespace the kernel shows groups that it does not map as this one.
    assert job.groups == [[2000, "lab"], [65534, "nogroup"]]
    assert plan(confine="landlock").job.groups == [[2000, "lab"]]
    assert job.rlimits == {"NOFILE": [1024, 4096]}
    assert job.localtime == b"TZif"
    assert (job.job_dir, job.cwd, job.tty) == (b"job", None, False)
    assert [(layer.source, layer.fstype) for layer in job.layers] == [(b"/dev/ubdc", "squashfs")]
    assert Job.load(job.dump()) == job


def test_shown() -> None:
    shown = {item.name: (item.source, item.writable) for item in plan().shown}
    assert shown["job"] == ("/work/a job", True)
    assert shown["kernel"] == ("/pot/linux", False)
    assert shown["runtime"] == ("/pot/runtime.ext4", False)
    assert shown["image0"] == ("/images/base.squashfs", False)
    assert [name for name, (_, writable) in shown.items() if writable] == ["job"]


def test_copied_job_directory() -> None:
    """The guest is shown nothing of it, and what comes back has a place."""
    made = plan(replace(Request(IMAGE, COMMAND), inputs=("*.c",)), job_files="copy")
    assert "job" not in [item.name for item in made.shown]
    assert (made.job.job_dir, made.job.job_copy, made.job.has_job_dir()) == (None, True, True)
    assert (made.copied, made.returned, made.inputs) == ("/work/a job", "/work/a job", ("*.c",))
    shared = plan()
    assert (shared.copied, shared.returned, shared.job.job_copy) == (None, None, False)


def test_no_job_directory() -> None:
    made = plan(found=replace(FOUND, job_directory=None))
    assert made.job.job_dir is None
    assert not [item for item in made.shown if item.writable]


def test_host_image() -> None:
    made = plan(Request(None, COMMAND))
    (layer,) = made.job.layers
    assert (layer.source, layer.fstype) == (b"host", "hostfs")
    assert {"home", "root", "tmp", "run"} <= set(layer.hidden)
    assert made.job.search_path == b"/opt/bin:/bin"


def test_too_little_memory() -> None:
    with pytest.raises(UsageError, match="too little"):
        plan(memory="63M")


def test_no_helper_is_a_warning_by_default_and_an_error_when_asked_for() -> None:
    without = replace(HOST, slirp=None, qemu_user_network=False)
    alone = replace(FOUND, capabilities=without)
    able = replace(FOUND, capabilities=replace(without, qemu_user_network=True))
    assert plan(found=able).network_helper is None, "of UML it is no part"
    qemu = plan(found=replace(able, hypervisor=Qemu(HOST)))
    assert qemu.network_helper == NetworkHelper(NetworkKind.QEMU, str(HOST.qemu), True)
    assert qemu.warnings == ()
    assert "slirp4netns" in plan(found=alone).warnings[0]
    assert plan(found=alone).network_helper is None
    with pytest.raises(UsageError, match="slirp4netns"):
        plan(found=alone, network="user")


def test_place_paths() -> None:
    made = plan(Request(None, COMMAND, binds=(Bind("/data", "/mnt", True, False),)))
    before = made.job.dump()
    job = placed(made.job, "/view")
    assert (job.job_dir, job.exchange) == (b"/view/job", b"/view/exchange")
    assert job.layers[0].source == b"/view/host"
    assert job.mounts[0].source == b"/view/bind0"
    assert made.job.dump() == before, "a second start of this plan places its paths once, too"


_EVENTS: list[str] | None = None


def _note(event: str, _: tuple[object, ...]) -> None:
    if _EVENTS is not None:
        _EVENTS.append(event)


@pytest.mark.parametrize("hypervisor", [Uml, Qemu, Kvm, Xen])
def test_planning_touches_nothing(hypervisor: type[Uml | Qemu | Xen]) -> None:
    """No file is opened, no directory listed, no process started: not one audited call."""
    global _EVENTS
    found = replace(FOUND, hypervisor=hypervisor(HOST), capabilities=HOST)
    binds = (Bind("/data", "/mnt", True, False),)
    request = replace(Request(IMAGE, COMMAND), binds=binds, changes=(IMAGE,))
    wanted = settings()
    sys.addaudithook(_note)
    _EVENTS = []
    try:
        planner.make_plan(request, wanted, CALLER, found)
        seen = _EVENTS
    finally:
        _EVENTS = None
    assert [event for event in seen if event != "object.__getattr__"] == []


def test_bind(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert parse_bind(f"{tmp_path}:/data") == Bind(str(tmp_path), "/data", False, False)
    assert parse_bind(f"{file}:/etc/x/:ro") == Bind(str(file), "/etc/x", True, True)
    assert parse_bind(str(tmp_path)) == Bind(str(tmp_path), str(tmp_path), False, False)
    assert parse_bind(f"{tmp_path}:/a:b:rw").target == "/a:b"


def test_bind_without_a_target() -> None:
    assert parse_bind("/etc:").target == "/etc"


@pytest.mark.parametrize("text", ["/no/such:/data", "/etc:data"])
def test_bad_bind(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bind(text)


@pytest.mark.parametrize(
    ("text", "ports"), [("8080:80", (8080, 80)), ("80", (80, 80)), ("65535:1", (65535, 1))]
)
def test_forward(text: str, ports: tuple[int, int]) -> None:
    assert parse_forward(text) == ports


@pytest.mark.parametrize("text", ["", ":", "0:1", "1:65536", "x:1", "1:-1", "1:2:3"])
def test_bad_forward(text: str) -> None:
    with pytest.raises(UsageError):
        parse_forward(text)


CONTAINER = replace(
    IMAGE,
    record=Record(
        *("d", "tool", "1", "squashfs", 0),
        entrypoint=("/entry",),
        command=("one",),
        env={"PATH": "/opt/tool:/bin"},
        workdir="/data",
        user="1000:5",
    ),
)


CONSOLE: dict[str, Any] = {"shell": True}


@pytest.mark.parametrize(
    ("words", "more", "argv"),
    [
        ((), {}, [b"/entry", b"one"]),
        ((b"a", b"b"), {}, [b"/entry", b"a", b"b"]),
        ((), {"entrypoint": ("sh", "-c")}, [b"sh", b"-c"]),
        ((b"a",), {"entrypoint": ()}, [b"a"]),
        ((), CONSOLE, []),
        ((b"x",), {"in_pot": True}, [b"x"]),
    ],
)
def test_a_container_images_command(
    words: tuple[bytes, ...], more: dict[str, Any], argv: list[bytes]
) -> None:
    assert plan(Request(CONTAINER, words, **more)).job.argv == argv


def test_a_container_images_surroundings() -> None:
    job = plan(Request(CONTAINER, ())).job
    assert (job.user, job.cwd, job.env[b"PATH"]) == ("1000:5", b"/data", b"/opt/tool:/bin")
    asked = plan(Request(CONTAINER, (), workdir="/w", env={b"PATH": b"/x"}), user="root")
    assert (asked.job.user, asked.job.cwd, asked.job.env[b"PATH"]) == ("root", b"/w", b"/x")
    console = plan(Request(CONTAINER, (), **CONSOLE)).job
    assert (console.user, console.cwd) == ("user", None)


def test_the_partition_of_a_sif_is_mounted_where_it_lies() -> None:
    probed = Probed(ImageFormat.SIF, 1 << 20, "squashfs", 8192, 4096)
    image = Image("/c.sif", ImageFormat.SIF, None, None, probed)
    (layer,) = plan(Request(image, COMMAND)).job.layers
    assert (layer.fstype, layer.offset) == ("squashfs", 8192)


@pytest.mark.parametrize(
    ("home", "extra"),
    [
        (b"/home/alice", ()),
        (b"/root", ()),
        (b"/users/alice", ("users",)),
        (b"/gpfs/home/alice", ("gpfs/home",)),
        (b"/opt/alice", ("opt/alice",)),
        (b"/var/lib/svc", ("var/lib/svc",)),
        (b"/alice", ("alice",)),
        (b"/", ()),
    ],
)
def test_homes_of_the_host_are_hidden_wherever_they_are(
    home: bytes, extra: tuple[str, ...]
) -> None:
    assert hidden_of_host({b"HOME": home}) == (*HOST_HIDDEN, *extra)
