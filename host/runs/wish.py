"""A wish: what somebody asks of a run, before anything is looked up.

Whoever starts a virtual machine makes one: the command line, `apppot-start`, the doctor, builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from apppot.host.common.frozen import frozen
from apppot.host.config.settings import Options
from apppot.host.plan.request import Bind


@frozen
class Wish:
    """What is asked of one run.  Empty and None: not asked for, settings or the image decide."""

    image: str | None  # a reference, `host`; None: `cow` has it
    argv: tuple[bytes, ...] = ()
    options: Options = Options()
    changes: tuple[str, ...] = ()  # files, lowest first
    session: str | None = None  # by name; it is made where it is new
    binds: tuple[Bind, ...] = ()
    env: Mapping[bytes, bytes] = field(default_factory=dict)
    workdir: str | None = None
    entrypoint: tuple[str, ...] | None = None  # instead of the image's
    shell: bool = False  # a login shell, whatever the image's default command
    tty: bool | None = None  # None: where the caller's stdin and stdout are terminals
    stdin: bool = True  # the caller's; else it is /dev/null
    inputs: tuple[str, ...] = ()  # patterns of what a copy of the job directory has
    outputs: tuple[str, ...] = ()  # patterns of what comes back at the end
    follow: tuple[str, ...] = ()  # files that come back while they grow
    forwards: tuple[tuple[int, int], ...] = ()  # (host port, guest port), TCP
    neutral: bool = False  # nothing of the caller shows in the guest: for building images
    in_pot: bool = False  # the command is the pot's own program
    # What only the original's command line can ask for.
    cow: tuple[str, str, int] | None = None  # see Request.cow
    extra: tuple[str, ...] = ()  # more words for the kernel's command line
    run_scripts: bool = False  # without argv: apppot-run, apppot-autorun
