"""What the tests of plans share: a caller, a host, an image, and a plan of them."""

from __future__ import annotations

from typing import Any

from apppot.host.capabilities.capabilities import QEMU_DEVICES, QEMU_MACHINES, Capabilities
from apppot.host.capabilities.memory import Memory
from apppot.host.config.caller import Caller
from apppot.host.config.settings import Options, Settings, resolve
from apppot.host.hypervisor.launchplan import KernelChoice, LaunchPlan
from apppot.host.hypervisor.uml import Uml
from apppot.host.images.probe import ImageFormat, Probed
from apppot.host.images.record import Image
from apppot.host.plan import planner
from apppot.host.plan.request import Findings, Request

CALLER = Caller(
    uid=1234,
    gid=100,
    groups=((2000, "lab"),),
    umask=0o027,
    rlimits={"NOFILE": [1024, 4096]},
    env={b"LANG": b"C.UTF-8", b"PATH": b"/opt/bin:/bin", b"HOME": b"/h", b"SSH_TTY": b"x"},
    localtime=b"TZif",
    closed=(),
    terminals=(),
    foreground=True,
)
KERNEL = KernelChoice(
    path="/pot/linux",
    release="7.2.12",
    digest="d",
    tuned=True,
    features=frozenset(("seccomp", "ncpus")),
    lpj=29581312,
)
HOST = Capabilities(
    bwrap="/usr/bin/bwrap",
    bwrap_reason="",
    landlock=6,
    slirp="/usr/bin/slirp4netns",
    qemu="/usr/bin/qemu-system-x86_64",
    qemu_version=(7, 2, 22),
    qemu_machines=frozenset(QEMU_MACHINES),
    qemu_devices=frozenset(QEMU_DEVICES),
    max_map_count=65530,
)
UML = Uml(HOST)
FOUND = Findings(
    hypervisor=UML,
    capabilities=HOST,
    as_root=False,
    kernel=KERNEL,
    modules=None,
    runtime="/pot/runtime.ext4",
    rows=24,
    columns=80,
    job_directory="/work/a job",
    room=Memory(8 << 30, 4 << 30, "the host"),
)
PROBED = Probed(ImageFormat.SQUASHFS, 4096)
IMAGE = Image("/images/base.squashfs", ImageFormat.SQUASHFS, None, None, PROBED)
COMMAND = (b"echo", b"\xff two")


def settings(**options: Any) -> Settings:
    return resolve(Options(**options), {})


def plan(request: Request | None = None, found: Findings = FOUND, **options: Any) -> LaunchPlan:
    request = request or Request(IMAGE, COMMAND)
    return planner.make_plan(request, settings(**options), CALLER, found)
