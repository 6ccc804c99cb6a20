"""Options of a run, and the wish that they make."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from apppot.host.common.errors import UsageError

if TYPE_CHECKING:
    from apppot.host.plan.request import Bind
    from apppot.host.runs.wish import Wish


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


def stream_options(parser: argparse.ArgumentParser) -> None:
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


def parse_entrypoint(text: str | None) -> tuple[str, ...] | None:
    import shlex

    try:
        return None if text is None else tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"--entrypoint {text!r}: {error}", "quote it as in a shell") from None


def wish(args: argparse.Namespace) -> Wish:
    """What the arguments of `run`, `console` and `warm` ask for.  Raises UsageError."""
    from apppot.host.config.settings import Options
    from apppot.host.runs.wish import Wish

    return Wish(
        image=args.image,
        argv=command(args.argv),
        options=Options(
            image=args.image,
            memory=args.memory,
            cpus=args.cpus,
            kernel=args.kernel,
            hypervisor=args.hypervisor,
            network=args.network,
            confine=args.confine,
            time=args.time,
            scratch=args.scratch,
            hostname=args.hostname,
            user=args.user,
            job_dir=args.job_dir,
            job_files=args.job_files,
            log=args.log,
            warm=args.warm,
        ),
        changes=tuple(args.changes),
        session=args.session,
        binds=tuple(parse_bind(text) for text in args.bind),
        env=environment(args.env_file, args.env),
        workdir=args.workdir,
        entrypoint=parse_entrypoint(args.entrypoint),
        shell=args.console,
        tty=args.tty,
        # Nobody types into what runs in the background.
        stdin=not args.no_stdin and not args.detach,
        inputs=tuple(args.input or ()),
        outputs=tuple(args.output or ()),
        follow=tuple(args.follow or ()),
        forwards=tuple(parse_forward(text) for text in args.publish),
        neutral=args.neutral,
        in_pot=args.in_pot,
    )


def command(words: Sequence[str]) -> tuple[bytes, ...]:
    """The command in an argument list, which may begin with `--`."""
    # argv arrived by os.fsdecode: this gives back the very bytes.
    found = tuple(os.fsencode(word) for word in words)
    return found[1:] if found[:1] == (b"--",) else found


def parse_bind(text: str) -> Bind:
    """SRC[:DST][:ro|rw].  Raises UsageError where SRC is missing or DST not absolute."""
    from apppot.host.plan.request import Bind

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


def environment(files: Sequence[str], texts: Sequence[str]) -> dict[bytes, bytes]:
    """What --env-file and --env set.  Raises UsageError."""
    env: dict[bytes, bytes] = {}
    for path in files:
        env.update(_environment_file(path))
    for text in texts:
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
