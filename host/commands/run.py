"""`apppot run` and `apppot console`: one virtual machine, as if it were a program."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from apppot.host.common.errors import ApppotError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apppot.host.capabilities.capabilities import Capabilities, Memory
    from apppot.host.config.caller import Caller
    from apppot.host.config.settings import Setting
    from apppot.host.hypervisor.base import Hypervisor
    from apppot.host.hypervisor.launchplan import KernelChoice, LaunchPlan
    from apppot.host.images.store import Image
    from apppot.host.machine.launch import Run
    from apppot.host.plan.planner import Bind, Ground, Request
    from apppot.host.runs.recorder import Book
    from apppot.host.warm.machine import Resuming
    from apppot.host.warm.store import Kept

STARTED = time.monotonic()


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `run` and `console`; what stands after IMAGE belongs to the command."""
    console = parser.prog.endswith(" console")
    parser.usage = f"{parser.prog} [OPTION]… IMAGE" + ("" if console else " [COMMAND [ARG]…]")
    machine_options(parser)
    surroundings_options(parser)
    _stream_options(parser)
    parser.add_argument("image", metavar="IMAGE", help="name[:version], digest, file, or `host`")
    parser.add_argument(
        "argv", metavar="COMMAND", nargs=argparse.REMAINDER, help="default: the image's own"
    )
    parser.set_defaults(func=main, console=console)


_FILES_OPTIONS = {
    "--input": "copy only these files of the job directory",
    "--output": "bring only these files back (default: all that is new or changed)",
    "--follow": "bring this file back while it grows",
}


def machine_options(parser: argparse.ArgumentParser) -> None:
    """What `warm` shares with `run`: the machine."""
    add = parser.add_argument_group("machine").add_argument
    add("--mem", dest="memory", metavar="SIZE", help="guest memory (default 512M)")
    add("--cpus", metavar="N", help="guest CPUs (default 1)")
    add("--scratch", metavar="SIZE", help="put the writable layer on a sparse disk file")
    add("--session", metavar="NAME", help="keep what is written under this name (made if new)")
    add("--time", metavar="DURATION", help="time limit, like 90s, 5m, 2h, 01:30:00")
    add("--network", metavar="KIND", help="user (default: outbound only) or none")
    add(
        "-p", "--publish", metavar="HOST:GUEST", action="append", default=[],
        help="forward a TCP port of this host's loopback to the guest",
    )  # fmt: skip
    add("--hypervisor", metavar="NAME", help="auto, uml, kvm, xen or qemu")
    add(
        "--warm", dest="warm", action="store_const", const="auto",
        help="resume from a machine that `apppot warm` kept (default, where there is one)",
    )  # fmt: skip
    add("--no-warm", dest="warm", action="store_const", const="off", help="boot in any case")
    add("--kernel", metavar="FILE", help="guest kernel instead of the pot's")
    add("--confine", metavar="HOW", help="auto (default), required, bubblewrap, landlock or off")
    add("-d", "--detach", action="store_true", help="run in the background; print the run's id")
    add("--name", metavar="NAME", help="how `ps`, `exec` and others call this run")
    add("--gpus", "--nv", "--rocm", dest="gpu", nargs="?", const="all", help=argparse.SUPPRESS)


def surroundings_options(parser: argparse.ArgumentParser) -> None:
    """What `warm` shares with `run`: what the command finds around it."""
    add = parser.add_argument_group("surroundings of the command").add_argument
    add(
        "-v", "--bind", metavar="SRC:DST[:ro]", action="append", default=[],
        help="show a file or directory of this host in the guest",
    )  # fmt: skip
    add("--job-dir", metavar="DIR", help="directory shown at /home/user/job (default: .), or none")
    add("--job-files", metavar="HOW", help="share the job directory (default), or copy its files")
    for option, words in _FILES_OPTIONS.items():
        add(option, metavar="FILE" if option == "--follow" else "GLOB", action="append", help=words)
    add("--changes", metavar="FILE", action="append", default=[], help="changes over the image")
    add(
        "-e", "--env", metavar="NAME[=VALUE]", action="append", default=[],
        help="set a variable; without a value, pass the caller's on",
    )  # fmt: skip
    add("--env-file", metavar="FILE", action="append", default=[], help="variables, one a line")
    add("-w", "--workdir", metavar="DIR", help="where the command starts")
    add("-u", "--user", metavar="USER", help="who runs it: user (default), root, a name, UID[:GID]")
    add("--entrypoint", metavar="WORDS", help="instead of the image's; empty for none")
    add("--hostname", metavar="NAME", help="the guest's host name")


def _stream_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("streams and reports").add_argument
    add("-n", dest="no_stdin", action="store_true", help="stdin is /dev/null")
    add("-t", dest="tty", action="store_const", const=True, help="give the command a terminal")
    add("-T", dest="tty", action="store_const", const=False, help="give it none")
    add("-i", "--interactive", action="store_true", help=argparse.SUPPRESS)
    add("--rm", action="store_true", help=argparse.SUPPRESS)
    # Nothing of the caller shows in the guest: images are built so, see building/steps.py.
    add("--neutral", action="store_true", help=argparse.SUPPRESS)
    # How the launcher has the guest work on layers, see host/images/changes/inguest.py.
    add("--in-pot", action="store_true", help=argparse.SUPPRESS)
    add("--log", metavar="FILE", help="write the guest's console there")
    add("--timeline", metavar="FILE", help="draw where the time went (.svg, or .json)")
    add("--explain", action="store_true", help="print settings, plan and argv; start nothing")
    add("--json", action="store_true", help="print the report (or plan) as JSON on stderr")


def main(args: argparse.Namespace) -> int:
    """Run one virtual machine; returns the payload's exit status."""
    if args.gpu is not None:
        raise UsageError(
            "a GPU of the host cannot be reached from a virtual machine of AppPot",
            "run on the CPU, or use a container where the site offers one",
        )
    if args.explain:
        from apppot.host.commands.explain import explain

        with contextlib.ExitStack() as stack:
            explain(Prepared(args, stack), sys.stdout, as_json=args.json)
        return 0
    if getattr(args, "detach", False):
        from apppot.host.runs import detached

        args.no_stdin = True
        return detached.start(lambda book: _run_claimed(args, book), partial(_book, args))
    if getattr(args, "name", None) is None:
        return _run(args, lambda: _book(args))
    book = _book(args)
    book.claim()
    return _run_claimed(args, book)


def _book(args: argparse.Namespace, **options: Any) -> Book:
    """The run's record, made in the process that the run is of."""
    from apppot.host.runs.recorder import Book

    command = [os.fsencode(word).decode(errors="replace") for word in args.argv]
    return Book(str(args.image), command, getattr(args, "name", None), **options)


def _run_claimed(args: argparse.Namespace, book: Book) -> int:
    """Run it, with its end in a record that stays."""
    from apppot.host.runs.recorder import status_of

    try:
        status = _run(args, lambda: book)
    except BaseException as error:
        book.ended(status_of(error), f"{error}" or type(error).__name__)
        raise
    book.ended(status)
    return status


def _run(args: argparse.Namespace, open_book: Callable[[], Book]) -> int:
    with contextlib.ExitStack() as stack:
        record = run_first(Prepared(args, stack), open_book)
    return _report(record, args)


def run_first(prepared: Prepared, open_book: Callable[[], Book] | None = None) -> Run:
    """Run on the first hypervisor whose guest says HELLO; before that no payload has started."""
    from apppot.host.hypervisor import verdicts
    from apppot.host.machine import launch

    while True:
        kept, hypervisor = prepared.kept(), prepared.hypervisor
        try:
            with contextlib.ExitStack() as stack:
                warmth = None if kept is None else _resuming(kept, prepared, stack)
                return launch.run(
                    prepared.plan if warmth is None else warmth.plan,
                    hypervisor if kept is None else hypervisor.alone(),
                    prepared.capabilities,
                    prepared.request.read_stdin,
                    open_book,
                    warmth,
                )
        except launch.NoHello as error:
            if kept is not None:
                prepared.give_up(kept, error.reason)
                continue
            silent, digest = prepared.hypervisor, prepared.plan.kernel.digest
            if not prepared.next_hypervisor():
                raise
            verdicts.remember(silent.name, digest, error.reason)
            sys.stderr.write(
                f"apppot: warning: {silent.name}: {error.reason}; trying "
                f"{prepared.hypervisor.name}, also next time until this host boots again\n"
            )


def _resuming(kept: Kept, prepared: Prepared, stack: contextlib.ExitStack) -> Resuming:
    from apppot.host.machine.launch import NoHello
    from apppot.host.warm.machine import Resuming

    try:
        return Resuming(kept, prepared.keepable(), stack)
    except OSError as error:
        reason = f"the kept machine cannot be read: {error}"
        raise NoHello(reason, "", reason) from error


def _report(record: Run, args: argparse.Namespace) -> int:
    from apppot.host.machine import launch

    assert record.outcome is not None
    complaint = launch.complaint(record.outcome)
    if complaint:
        sys.stderr.write(f"apppot: {complaint}\n")
    status = launch.exit_code(record.outcome)
    _learn_calibration(record)
    if args.timeline or args.json:
        from apppot.host.runs import timeline

        steps = timeline.steps(record, STARTED)
        if args.timeline:
            timeline.write(steps, args.timeline)
        if args.json:
            timeline.print_json(record, steps, status)
    return status


def _learn_calibration(record: Run) -> None:
    """Remember what this guest's kernel measured, so that the next one need not."""
    kernel = record.plan.kernel
    unknown = kernel.lpj is None and kernel.tuned and record.hypervisor.kernel == "uml"
    if not unknown or record.console is None:
        return
    from apppot.host.pot import layout

    _, found, rest = record.console.text().partition("(lpj=")
    number = rest.partition(")")[0]
    if found and number.isdigit():
        layout.remember_lpj(kernel.digest, int(number))


class Prepared:
    """A command line made into a plan: settings, image, capabilities, plan.

    What the plan holds (a session) is released with `stack`.
    """

    def __init__(self, args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        from apppot.host.capabilities import capabilities
        from apppot.host.common import paths
        from apppot.host.config import settings as config
        from apppot.host.config.caller import Caller
        from apppot.host.hypervisor.choice import candidates

        options = {name: getattr(args, name, None) for name in config.RULES}
        self.settings: dict[str, Setting] = config.resolve(
            options, os.environ, paths.config_files()
        )
        self.capabilities = capabilities.limited(
            capabilities.probe(),
            self.settings["qemu_machine"].value,
            self.settings["qemu_share"].value,
        )
        self._candidates = candidates(self.settings["hypervisor"], self.capabilities)
        self.caller = Caller.of_this_process()
        if getattr(args, "neutral", False):
            self.caller = self.caller.neutral()
        tty = wants_terminal(args, self.caller)
        self.request: Request = _request(args, tty, self.caller)
        if getattr(args, "session", None) is not None:
            disk = hold_session(args, self.request, stack)
            self.request = replace(self.request, session_disk=disk)
        self.room = capabilities.memory()
        self._problems: dict[str, ApppotError] = {}
        self._plan()
        if self.hypervisor.host_memory:
            check_memory(self.settings["memory"], self.room)

    @property
    def hypervisor(self) -> Hypervisor:
        """The one that `plan` is for."""
        return self._candidates[0]

    def kept(self) -> Kept | None:
        """The kept machine that this run can resume from, where there is one."""
        if self.settings["warm"].value == "off" or not self.hypervisor.monitored:
            return None
        from apppot.host.common import paths

        if not os.path.isdir(os.path.join(paths.cache_home(), "warm")):
            return None
        from apppot.host.common.errors import Unsuited
        from apppot.host.warm import key, store

        try:
            plan, hypervisor = self.keepable(), self.hypervisor.alone()
        except Unsuited:
            return None
        if key.obstacle(plan, hypervisor):
            return None
        return store.find(key.key(plan, hypervisor, self.request))

    def keepable(self) -> LaunchPlan:
        """The plan of a machine that can be kept: it has no process beside its own.

        Raises Unsuited where such a machine cannot do what is asked.
        """
        hypervisor = self.hypervisor.alone()
        if hypervisor.share == self.hypervisor.share:
            return self.plan
        from apppot.host.plan import planner

        ground = replace(self.ground, hypervisor=hypervisor)
        return planner.make_plan(self.request, self.settings, self.caller, ground)

    def give_up(self, kept: Kept, reason: str) -> None:
        """Delete a kept machine of which no guest came to life, and start cold."""
        from apppot.host.warm import store

        self.settings["warm"] = replace(self.settings["warm"], value="off")
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
        from apppot.host.plan import planner

        if self.request.image is None and self.request.cow is None:
            # The host's root is many file systems.
            self._candidates[0] = self.hypervisor.alone()
        try:
            check_kernel_file(self.settings["kernel"], self.hypervisor)
            self.ground: Ground = _ground(self)
            if not self.is_last and verdicts.recall(
                self.hypervisor.name, self.ground.kernel.digest
            ):
                return False
            self.plan = planner.make_plan(self.request, self.settings, self.caller, self.ground)
        except (PotError, Unsuited) as error:
            self._problems[self.hypervisor.name] = error
            if self.is_last:
                # What User-Mode Linux lacks tells most: it needs the least.
                raise self._problems.get("uml", error) from None
            return False
        return True


def hold_session(args: argparse.Namespace, request: Request, stack: contextlib.ExitStack) -> str:
    """The disk of the session asked for, made if it is new and held until `stack` closes."""
    from apppot.host.images import sessions

    base = "+".join([_digest(request.image), *map(_digest, request.changes)])
    session = sessions.find(args.session)
    if session is None:
        changes = tuple(os.path.realpath(image.path) for image in request.changes)
        is_file = request.image is not None and request.image.digest is None
        image = os.path.realpath(args.image) if is_file else args.image
        session = sessions.create(args.session, image, base, changes)
    sessions.check_base(session, base)
    stack.enter_context(sessions.held(session))
    return session.disk


def _digest(image: Image | None) -> str:
    """The image's digest; a file outside the store has it computed."""
    from apppot.host.images.store import known_digest

    if image is None:
        return "host"
    return image.digest or known_digest(image.path)


def wants_terminal(args: argparse.Namespace, caller: Caller) -> bool:
    """Whether the payload gets a terminal: as asked, else where stdin and stdout are terminals."""
    terminals = caller.terminals if caller.foreground else ()
    if args.tty is not None:
        return bool(args.tty)
    if args.no_stdin:
        return False
    return (0 in terminals and 1 in terminals) or (args.console and 0 in terminals)


def _request(args: argparse.Namespace, tty: bool, caller: Caller) -> Request:
    from apppot.host.plan.planner import Request

    # Not os.fsencode on the way in: argv arrived by it, so this gives back the very bytes.
    argv = tuple(os.fsencode(word) for word in args.argv)
    if argv[:1] == (b"--",):
        argv = argv[1:]
    cow = getattr(args, "cow", None)
    image = None if cow is not None else find_image(args.image)
    return Request(
        image=image,
        argv=argv,
        changes=_changes(args.changes, image),
        binds=tuple(parse_bind(text) for text in args.bind),
        env=environment(args),
        workdir=args.workdir,
        tty=tty,
        # In the background, reading the terminal would stop the launcher.
        read_stdin=not args.no_stdin and (caller.foreground or 0 not in caller.terminals),
        shell=args.console,
        entrypoint=_entrypoint(getattr(args, "entrypoint", None)),
        in_pot=args.in_pot,
        inputs=tuple(getattr(args, "input", None) or ()),
        outputs=tuple(getattr(args, "output", None) or ()),
        follow=tuple(getattr(args, "follow", None) or ()),
        forwards=tuple(parse_forward(text) for text in args.publish),
        # What only the original's command line can ask for.
        cow=cow,
        extra=getattr(args, "extra", ()),
        run_scripts=getattr(args, "run_scripts", False),
    )


def _entrypoint(text: str | None) -> tuple[str, ...] | None:
    import shlex

    try:
        return None if text is None else tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--entrypoint {text!r}: {error}", "quote it as in a shell") from None


def find_image(reference: str) -> Image | None:
    """The image that `reference` names; None for `host`.  Raises ImageError."""
    from apppot.host.images import store
    from apppot.host.plan.planner import HOST_IMAGE

    return None if reference == HOST_IMAGE else store.resolve(reference)


def _changes(paths: list[str], image: Image | None) -> tuple[Image, ...]:
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
    from apppot.host.images import store
    from apppot.host.images.changes import record as changes

    found = store.resolve(path if "/" in path else f"./{path}")
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


def parse_bind(text: str) -> Bind:
    """SRC[:DST][:ro|rw].  Raises UsageError where SRC is missing or DST not absolute."""
    from apppot.host.plan.planner import Bind

    parts = text.split(":")
    mode = parts.pop() if len(parts) > 1 and parts[-1] in ("ro", "rw") else "rw"
    source = os.path.abspath(parts[0])
    target = ":".join(parts[1:]) or source
    if not target.startswith("/"):
        raise UsageError(f"--bind {text}: {target!r} is not an absolute path of the guest")
    if not os.path.exists(source):
        hint = "SRC is a path of this host, DST one of the guest: --bind SRC:DST[:ro]"
        raise UsageError(f"--bind {text}: {source} does not exist on this host", hint)
    is_file = not os.path.isdir(source)
    # A file by its own name: the guest mounts the directory that holds it.
    place = os.path.realpath(source) if is_file else source
    return Bind(place, os.path.normpath(target), mode == "ro", is_file)


def parse_forward(text: str) -> tuple[int, int]:
    """HOST:GUEST as port numbers.  Raises UsageError."""
    host, _, guest = text.partition(":")
    numbers = [int(word) if word.isdigit() else 0 for word in (host, guest or host)]
    if not all(0 < number < 65536 for number in numbers):
        raise UsageError(f"--publish {text}: not HOSTPORT:GUESTPORT", "write it like 8080:80")
    return numbers[0], numbers[1]


def environment(args: argparse.Namespace) -> dict[bytes, bytes]:
    """What --env-file and --env set.  Raises UsageError."""
    env: dict[bytes, bytes] = {}
    for path in args.env_file:
        env.update(_environment_file(path))
    for text in args.env:
        env.update(_variable(os.fsencode(text)))
    return env


def _variable(word: bytes) -> dict[bytes, bytes]:
    name, equals, value = word.partition(b"=")
    if not name:
        raise UsageError(f"--env {os.fsdecode(word)!r}: no name")
    if equals:
        return {name: value}
    return {name: os.environb[name]} if name in os.environb else {}


def _environment_file(path: str) -> dict[bytes, bytes]:
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError as error:
        raise UsageError(f"--env-file {path}: {error.strerror}") from error
    env: dict[bytes, bytes] = {}
    for line in lines:
        if line.strip() and not line.lstrip().startswith(b"#"):
            env.update(_variable(line.rstrip(b"\r")))
    return env


def check_memory(setting: Setting, room: Memory) -> None:
    """Say beforehand when the memory asked for cannot be had.  Raises UsageError."""
    if setting.value > room.total:
        raise UsageError(
            f"{setting.origin}: {setting.value >> 20} MB of memory cannot be had: "
            f"{room.limited_by} has {room.total >> 20} MB",
            "ask for less with --mem, or for a larger allocation",
        )
    if setting.value > room.available and setting.value > room.huge:
        sys.stderr.write(
            f"apppot: warning: {setting.value >> 20} MB of guest memory asked for, "
            f"{room.available >> 20} MB are free now\n"
        )


def _ground(prepared: Prepared) -> Ground:
    from apppot.host.common import terminal
    from apppot.host.confinement import bubblewrap
    from apppot.host.plan.planner import Ground, confinement_wish
    from apppot.host.pot import layout

    settings: dict[str, Any] = {name: item.value for name, item in prepared.settings.items()}
    if prepared.hypervisor.kernel == "uml":
        kernel, modules = _uml_kernel(settings, prepared.capabilities)
    else:
        kernel, modules = _x86_kernel(settings["kernel"]), None
    wish = confinement_wish(
        settings["confine"],
        prepared.hypervisor,
        host_image=prepared.request.image is None,
        uid=prepared.caller.uid,
        landlock=prepared.capabilities.landlock,
    )
    rows, columns = terminal.size(0)
    return Ground(
        hypervisor=prepared.hypervisor,
        kernel=kernel,
        modules=modules,
        runtime=layout.find_runtime(),
        slirp=prepared.capabilities.slirp,
        user_network=prepared.capabilities.qemu_user_network,
        rows=rows,
        columns=columns,
        job_directory=job_directory(settings["job_dir"]),
        confine=wish,
        room=prepared.room,
        mapped=bubblewrap.choose(wish, prepared.capabilities) is bubblewrap.Confinement.BUBBLEWRAP,
        hello_seconds=60.0 if prepared.is_last else 10.0,
    )


def _uml_kernel(settings: Mapping[str, Any], able: Capabilities) -> tuple[KernelChoice, str | None]:
    """The User-Mode Linux kernel, and the directory of its modules where it needs some."""
    from apppot.host.hypervisor.launchplan import KernelChoice
    from apppot.host.pot import layout

    kernel = layout.find_kernel(kernel=settings["kernel"])
    if not kernel.tuned:
        sys.stderr.write(f"apppot: {kernel.release} is not the pot's own: {layout.KERNEL_HINT}\n")
        _warn_of_mappings(settings["memory"], able.max_map_count)
    choice = KernelChoice(
        path=kernel.path,
        release=kernel.release,
        digest=kernel.digest,
        tuned=kernel.tuned,
        features=kernel.features,
        lpj=layout.lpj_for(kernel),
        libraries=kernel.libraries,
    )
    return choice, kernel.modules


def _x86_kernel(wanted: str | None) -> KernelChoice:
    """The pot's x86-64 kernel, or the file `wanted`, of which nothing is known."""
    from apppot.host.hypervisor.launchplan import KernelChoice
    from apppot.host.pot import layout

    if wanted is not None:
        return KernelChoice(os.path.abspath(wanted), "unknown", wanted, tuned=False)
    kernel = layout.find_x86_kernel()
    return KernelChoice(kernel.vmlinux, kernel.release, kernel.digest, tuned=True)


_HIGH_HALF = 0xFFFFFFFF80000000


def check_kernel_file(setting: Setting, hypervisor: Hypervisor) -> None:
    """Raise Unsuited where the kernel asked for is another kind than this hypervisor boots.

    One for a machine is a bzImage, or an ELF file that is linked to the high half of memory.
    """
    from apppot.host.common.errors import Unsuited

    if setting.value is None:
        return
    try:
        with open(setting.value, "rb") as file:
            head = file.read(0x206)
    except OSError:
        return  # whoever takes it says what is wrong
    linked = int.from_bytes(head[80:88], "little")  # p_vaddr of the first program header
    for_machine = head[0x202:] == b"HdrS" or (head[:4] == b"\x7fELF" and linked >= _HIGH_HALF)
    if for_machine != (hypervisor.kernel == "x86_64"):
        kind = "a kernel for x86-64 machines" if for_machine else "a User-Mode Linux kernel"
        raise Unsuited(
            f"{setting.origin}: {setting.value} is {kind}, which {hypervisor.name} does not boot",
            "leave out --hypervisor, or the kernel",
        )


_PAGE = 4096


def _warn_of_mappings(memory: int, max_map_count: int) -> None:
    """A stock kernel needs a mapping of the host for each run of contiguous guest pages."""
    if memory > max_map_count * _PAGE:
        sys.stderr.write(
            f"apppot: warning: this kernel may hang once a program has touched "
            f"{max_map_count * _PAGE >> 20} MB in random order: vm.max_map_count is "
            f"{max_map_count}\n  remedy: `apppot kernel build`, or less memory (--mem)\n"
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
