"""What is planned for, and what the plan stands on."""

from __future__ import annotations

from collections.abc import Mapping

from apppot.host.capabilities.capabilities import Capabilities
from apppot.host.capabilities.memory import Memory
from apppot.host.common.frozen import frozen
from apppot.host.hypervisor.base import Hypervisor
from apppot.host.hypervisor.launchplan import KernelChoice
from apppot.host.images.record import Image


@frozen
class Bind:
    """A host path that the guest shows at `target`."""

    source: str
    target: str
    read_only: bool
    is_file: bool


@frozen
class Request:
    """What the user asked for, beside the settings."""

    image: Image | None  # None: the host's own root
    argv: tuple[bytes, ...]
    changes: tuple[Image, ...] = ()
    binds: tuple[Bind, ...] = ()
    env: Mapping[bytes, bytes] | None = None
    workdir: str | None = None
    tty: bool = False
    read_stdin: bool = True
    forwards: tuple[tuple[int, int], ...] = ()
    run_scripts: bool = False
    entrypoint: tuple[str, ...] | None = None  # instead of the image's
    in_pot: bool = False  # the command is the pot's own program
    session_disk: str | None = None  # the writable layer, kept from run to run
    shell: bool = False  # a login shell, whatever the image's default command
    # UML copy-on-write file, its backing image, and where the file system starts in that (bytes)
    cow: tuple[str, str, int] | None = None
    extra: tuple[str, ...] = ()  # more words for the kernel's command line
    inputs: tuple[str, ...] = ()  # patterns of what a copy of the job directory has
    outputs: tuple[str, ...] = ()  # patterns of what comes back at the end
    follow: tuple[str, ...] = ()  # files that come back while they grow


@frozen
class Findings:
    """What was found out for a plan before it is made: kernel, runtime, what the host allows."""

    hypervisor: Hypervisor
    capabilities: Capabilities
    as_root: bool  # the launcher is uid 0, whoever the guest's user is
    kernel: KernelChoice
    modules: str | None
    runtime: str
    rows: int
    columns: int
    job_directory: str | None  # absolute, None: no job directory
    room: Memory  # of the host
    hello_seconds: float = 60.0  # how long to wait for a sign of life
