"""From a wish to a launch plan: what it names is looked up, then it is planned."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from apppot.host.common.errors import ApppotError, UsageError
from apppot.host.runs.kernels import check_kernel_file, uml_kernel, x86_kernel

if TYPE_CHECKING:
    from apppot.host.capabilities.memory import Memory
    from apppot.host.config.caller import Caller
    from apppot.host.config.settings import Setting, Settings
    from apppot.host.hypervisor.base import Hypervisor
    from apppot.host.hypervisor.launchplan import LaunchPlan
    from apppot.host.images.record import Image
    from apppot.host.plan.request import Findings, Request
    from apppot.host.runs.wish import Wish
    from apppot.host.warm.store import Kept


class PreparedRun:
    """A wish with its plan for the first hypervisor that can be tried, and those after it.

    What the plan holds (a session) is released with `stack`.
    """

    plan: LaunchPlan

    def __init__(self, wish: Wish, stack: contextlib.ExitStack) -> None:
        from apppot.host.capabilities import capabilities
        from apppot.host.capabilities.memory import memory
        from apppot.host.common import paths
        from apppot.host.config.caller import Caller
        from apppot.host.config.settings import resolve
        from apppot.host.hypervisor.choice import candidates

        self.settings: Settings = resolve(wish.options, os.environ, paths.config_files())
        self.capabilities = capabilities.limited(
            capabilities.probe(),
            self.settings.qemu_machine.value,
            self.settings.qemu_share.value,
        )
        self._candidates = candidates(self.settings.hypervisor, self.capabilities)
        self.caller = Caller.of_this_process()
        if wish.neutral:
            self.caller = self.caller.neutral()
        self.request: Request = _request(wish, self.caller)
        if wish.session is not None:
            disk = hold_session(wish, wish.session, self.request, stack)
            self.request = replace(self.request, session_disk=disk)
        self.room = memory()
        self._problems: dict[str, ApppotError] = {}
        self._plan()
        if self.hypervisor.host_memory:
            check_memory(self.settings.memory, self.room)

    @property
    def hypervisor(self) -> Hypervisor:
        """The one that `plan` is for."""
        return self._candidates[0]

    def kept(self) -> Kept | None:
        """The kept machine that this run can resume from, where there is one."""
        if self.settings.warm.value == "off" or not self.hypervisor.monitored:
            return None
        from apppot.host.common import paths

        if not os.path.isdir(os.path.join(paths.cache_home(), "warm")):
            return None
        from apppot.host.common.errors import Unsuited
        from apppot.host.warm import key, store

        try:
            plan = self.keepable()
        except Unsuited:
            return None
        return None if key.obstacle(plan) else store.find(key.key(plan, self.request))

    def keepable(self) -> LaunchPlan:
        """The plan of a machine that can be kept: it has no process beside its own.

        Raises Unsuited where such a machine cannot do what is asked.
        """
        hypervisor = self.hypervisor.without_servers()
        if hypervisor.share == self.hypervisor.share:
            return replace(self.plan, hypervisor=hypervisor)
        from apppot.host.plan.planner import make_plan

        found = replace(self._found, hypervisor=hypervisor)
        return make_plan(self.request, self.settings, self.caller, found)

    def give_up(self, kept: Kept, reason: str) -> None:
        """Delete a kept machine of which no guest came to life, and start cold."""
        from apppot.host.warm import store

        self.settings = replace(self.settings, warm=replace(self.settings.warm, value="off"))
        with contextlib.suppress(OSError):
            store.remove(kept)
        sys.stderr.write(f"apppot: warning: warm start: {reason}; it is deleted, starting cold\n")

    @property
    def is_last(self) -> bool:
        """Whether no other hypervisor is left to try."""
        return len(self._candidates) == 1

    def next_hypervisor(self) -> bool:
        """Plan for the next one that can be tried; False where there is none."""
        if self.is_last:
            return False
        del self._candidates[0]
        self._plan()
        return True

    def _plan(self) -> None:
        """Plan for the first candidate that can do what is asked; those before it are dropped."""
        while not self._plan_for_first():
            del self._candidates[0]

    def _plan_for_first(self) -> bool:
        from apppot.host.common.errors import PotError, Unsuited
        from apppot.host.hypervisor import verdicts
        from apppot.host.hypervisor.base import HypervisorName
        from apppot.host.plan.planner import make_plan

        if self.request.image is None and self.request.cow is None:
            # The host's root is many file systems.
            self._candidates[0] = self.hypervisor.without_servers()
        try:
            check_kernel_file(self.settings.kernel, self.hypervisor)
            self._found: Findings = _findings(self)
            digest = self._found.kernel.digest
            if not self.is_last and verdicts.recall(self.hypervisor.name, digest):
                return False
            self.plan = make_plan(self.request, self.settings, self.caller, self._found)
        except (PotError, Unsuited) as error:
            self._problems[self.hypervisor.name] = error
            if self.is_last:
                # What User-Mode Linux lacks tells most: it needs the least.
                raise self._problems.get(HypervisorName.UML, error) from None
            return False
        return True


def hold_session(wish: Wish, name: str, request: Request, stack: contextlib.ExitStack) -> str:
    """The disk of the session `name`, made if it is new and held until `stack` closes."""
    from apppot.host.images import sessions

    base = "+".join([_digest(request.image), *map(_digest, request.changes)])
    session = sessions.find(name)
    if session is None:
        changes = tuple(os.path.realpath(image.path) for image in request.changes)
        is_file = request.image is not None and request.image.digest is None
        reference = str(wish.image)
        image = os.path.realpath(reference) if is_file else reference
        session = sessions.create(name, image, base, changes)
    sessions.check_base(session, base)
    stack.enter_context(sessions.held(session))
    return session.disk


def _real(image: Image) -> Image:
    """The image by the path of its file itself: a link would lead out of a machine's view."""
    return replace(image, path=os.path.realpath(image.path))


def _digest(image: Image | None) -> str:
    """The image's digest; a file outside the store has it computed."""
    from apppot.host.images.digests import known_digest

    if image is None:
        return "host"
    return image.digest or known_digest(image.path)


def _request(wish: Wish, caller: Caller) -> Request:
    from apppot.host.plan.request import Request

    image = None if wish.image is None else find_image(wish.image)
    return Request(
        image=None if image is None else _real(image),
        argv=wish.argv,
        changes=tuple(_real(item) for item in _changes(wish.changes, image)),
        binds=wish.binds,
        env=wish.env,
        workdir=wish.workdir,
        tty=caller.wants_terminal(wish.tty, stdin=wish.stdin, shell=wish.shell),
        read_stdin=wish.stdin and caller.can_read_stdin,
        shell=wish.shell,
        entrypoint=wish.entrypoint,
        in_pot=wish.in_pot,
        inputs=wish.inputs,
        outputs=wish.outputs,
        follow=wish.follow,
        forwards=wish.forwards,
        cow=wish.cow,
        extra=wish.extra,
        run_scripts=wish.run_scripts,
    )


def find_image(reference: str) -> Image | None:
    """The image that `reference` names; None for `host`.  Raises ImageError."""
    from apppot.host.images.record import HOST_IMAGE
    from apppot.host.images.resolve import resolve

    return None if reference == HOST_IMAGE else resolve(reference)


def _changes(paths: Sequence[str], image: Image | None) -> tuple[Image, ...]:
    """The changes files at `paths`, lowest first, checked to belong to `image`.

    A tar is converted, once for each image.
    """
    from apppot.host.images.probe import ImageFormat, probe

    found: list[Image] = []
    for path in paths:
        if probe(path).format is ImageFormat.TAR:
            from apppot.host.images.changes import tarchanges

            found.append(tarchanges.convert(path, image, found))
        else:
            found.append(_changes_file(path, image))
    return tuple(found)


def _changes_file(path: str, image: Image | None) -> Image:
    """The changes file at `path`, checked to belong to `image`."""
    from apppot.host.images.changes import record as changes
    from apppot.host.images.resolve import resolve

    found = resolve(path if "/" in path else f"./{path}")
    record = changes.read(found.path)
    # The changes of changes (joined in a guest) have no base among them.
    if record is not None and not (image is not None and changes.read(image.path)):
        changes.check_base(path, record, _digest(image), _label(image))
    return found


def _label(image: Image | None) -> str:
    """What the user calls an image."""
    if image is None:
        return "host"
    return image.record.name if image.record is not None else image.path


def check_memory(setting: Setting[int], room: Memory) -> None:
    """Say beforehand when the memory asked for cannot be had.  Raises UsageError."""
    if setting.value > room.total:
        raise UsageError(
            f"{setting.origin}: {setting.value >> 20} MiB of memory cannot be had: "
            f"{room.limited_by} has {room.total >> 20} MiB",
            "ask for less with --mem, or for a larger allocation",
        )
    if setting.value > room.available and setting.value > room.huge:
        sys.stderr.write(
            f"apppot: warning: {setting.value >> 20} MiB of guest memory asked for, "
            f"{room.available >> 20} MiB are free now\n"
        )


def _findings(prepared: PreparedRun) -> Findings:
    from apppot.host.common import terminal
    from apppot.host.plan.request import Findings
    from apppot.host.pot import layout

    settings, able = prepared.settings, prepared.capabilities
    if prepared.hypervisor.kernel == "uml":
        kernel, modules = uml_kernel(settings.kernel.value, settings.memory.value, able)
    else:
        kernel, modules = x86_kernel(settings.kernel.value), None
    rows, columns = terminal.size(0)
    return Findings(
        hypervisor=prepared.hypervisor,
        capabilities=able,
        as_root=os.getuid() == 0,
        kernel=kernel,
        modules=modules,
        runtime=layout.find_runtime(),
        rows=rows,
        columns=columns,
        job_directory=job_directory(settings.job_dir.value),
        room=prepared.room,
        hello_seconds=60.0 if prepared.is_last else 10.0,
    )


def job_directory(text: str) -> str | None:
    """The job directory as an absolute path, None for `none`.  Raises UsageError."""
    if text == "none":
        return None
    hint = "change to another directory, or use --job-dir DIR or --job-dir none"
    try:
        path = os.path.abspath(text)
        if not os.path.isdir(path):
            raise UsageError(f"the job directory {path} is not a directory", hint)
        if not os.access(path, os.R_OK | os.X_OK):
            raise UsageError(f"the job directory {path} cannot be read", hint)
    except OSError as error:
        raise UsageError(f"the job directory {text}: {error.strerror}", hint) from error
    return path
