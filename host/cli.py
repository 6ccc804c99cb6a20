"""The command `apppot`: finds the subcommand, imports only its module, turns errors into exits.

Launcher imports are a budget (see benchmarks): nothing here may pull in what `run` does not need.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from apppot.host.common.errors import EXIT_FAILED, ApppotError

# Subcommand -> (module in apppot.host.commands, one line of help).  A module offers
# configure(parser), which adds the arguments and set_defaults(func=...); func(args) returns
# the exit status.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "run a command in a virtual machine"),
    "console": ("run", "open a console in a virtual machine"),
    "exec": ("exec", "run a command in a virtual machine that runs already"),
    "ps": ("ps", "list the virtual machines"),
    "logs": ("logs", "show what a run in the background has written"),
    "wait": ("wait", "wait for runs to end; return their status"),
    "stop": ("stop", "end runs: SIGTERM, after a while SIGKILL"),
    "rm": ("rm", "remove the records of runs that have ended"),
    "warm": ("warm", "keep machines that have booted, for runs that start from there"),
    "doctor": ("doctor", "say what this machine can do, and what to mend"),
    "image": ("image", "build, import and list images"),
    "pull": ("pull", "bring an image from a repository"),
    "publish": ("publish", "write a repository: a signed static web folder"),
    "key": ("key", "keys that sign repositories, and whom to trust"),
    "kernel": ("kernel", "build the guest kernel"),
    "pot": ("pot", "build, export and import the pot (kernel and runtime)"),
    "changes": ("changes", "save what a session changed, look at it, join several"),
    "session": ("session", "list, delete and enlarge sessions"),
    "timeline": ("timeline", "show where the time of a run went"),
    "completion": ("completion", "print a shell completion script"),
}


_RUN_NOTES = """\
What stands after IMAGE belongs to the command.  Defaults of options: $APPPOT_… variables, a batch
allocation, the configuration files (see `man apppot-run`); --explain shows each with its origin.

exit status:
  0-255  the command's own; 128+n where signal n ended it
  124    the time limit ended it
  125    AppPot failed: the message says why, and what helps
  126    the command cannot be executed
  127    the command was not found
"""

# Subcommand -> what its help says below the options.
NOTES = {
    "run": _RUN_NOTES
    + """
examples:
  apppot run debian-12 uname -a
  apppot run --mem 4G --cpus 2 --time 1h hmmer hmmsearch query.hmm sequences.fa
  apppot run host python3 -c 'print("this host, copy on write")'
""",
    "console": _RUN_NOTES,
    "doctor": "exit status: 0 when a guest can run here, 125 otherwise\n",
    "completion": "for this shell, and for good:\n"
    "  source <(apppot completion bash)\n"
    "  apppot completion bash > ~/.local/share/bash-completion/completions/apppot\n",
}

_TOP_NOTES = """\
start here:
  apppot doctor                    what this machine can do
  apppot run host uname -r         this host's own files in a guest: needs no image
  apppot image build debian-12     a first image, then: apppot run debian-12 COMMAND

exit status: the command's own with `run` and `console`; 0, or 125 with the cause, elsewhere
environment: APPPOT_MEM, APPPOT_CPUS, APPPOT_TIME, APPPOT_NETWORK and others: see `man apppot`
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that fails with exit 125 and suggests the word that was meant."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As usual, but each subcommand speaks for itself of what it does not know."""
        found, extras = super().parse_known_args(args, namespace)
        if extras:
            kind = "option" if extras[0].startswith("-") else "argument"
            near = nearest(extras[0].split("=")[0], list(self._option_string_actions))
            self.error(f"unknown {kind} {extras[0]}{near}")
        return found, extras

    def error(self, message: str) -> NoReturn:
        remedy = f"see `{self.prog} --help`"
        choice = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if choice:
            known = [word.strip("' ") for word in choice[2].split(",")]
            message = f"unknown word {choice[1]!r}{nearest(choice[1], known)}"
            remedy = f"one of: {', '.join(known)}"
        elif "required: IMAGE" in message:
            message = "IMAGE is missing"
            remedy = image_hint()
        sys.stderr.write(f"{self.prog}: {message}\n  remedy: {remedy}\n")
        raise SystemExit(EXIT_FAILED)


def nearest(word: str, known: Sequence[str]) -> str:
    """ " (did you mean …?)" for the known word that is nearest to `word`; empty for none."""
    import difflib

    near = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def image_hint() -> str:
    """Which images there are, for a command line without one."""
    from apppot.host.images import store

    try:
        names = sorted({record.name for _, record in store.list_images()})
    except ApppotError:
        names = []
    return f"name one of: {', '.join(['host', *names])}; or the path of an image"


def build_parser(only: str | None = None) -> Parser:
    """The whole parser, or with `only` one whose other subcommands are left out."""
    parser = Parser(
        prog="apppot",
        description="Run a Linux virtual machine as if it were a program.",
        epilog=_TOP_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(func=None)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (module_name, text) in COMMANDS.items():
        if only is not None and name != only:
            continue
        module = importlib.import_module(f"apppot.host.commands.{module_name}")
        sub = subparsers.add_parser(
            name,
            help=text,
            description=text,
            epilog=NOTES.get(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.configure(sub)
    return parser


def version() -> str:
    """The installed version; "unknown" in a tree that was never installed."""
    from importlib import metadata

    try:
        return metadata.version("apppot")
    except metadata.PackageNotFoundError:
        return "unknown"


def dispatch(argv: Sequence[str]) -> int:
    """Parse and run one command line; returns its exit status."""
    first = argv[0] if argv else None
    if first is not None and not first.startswith("-") and first not in COMMANDS:
        hint = nearest(first, list(COMMANDS))
        sys.stderr.write(f"apppot: unknown command {first!r}{hint}\n  remedy: `apppot --help`\n")
        return EXIT_FAILED
    parser = build_parser(first if first in COMMANDS else None)
    args = parser.parse_args(argv)
    if args.version:
        print(f"apppot {version()}")
        return 0
    if args.func is None:
        parser.print_help()
        return 0
    status: int = args.func(args)
    return status


def main(
    argv: Sequence[str] | None = None, serve: Callable[[Sequence[str]], int] = dispatch
) -> NoReturn:
    """Entry point; the one place where the launcher turns an error into an exit."""
    try:
        status = serve(sys.argv[1:] if argv is None else argv)
    except ApppotError as error:
        sys.stderr.write(f"apppot: {error}\n")
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    except Exception as error:
        status = _unexpected(error)
    raise SystemExit(status)


def _unexpected(error: Exception) -> int:
    """The exit status for what is no ApppotError: never 1, which would be a payload's own."""
    from apppot.host.channel.relay import Aborted

    if isinstance(error, Aborted):
        return error.exit_code
    import traceback

    traceback.print_exc()
    sys.stderr.write("apppot: this is a bug of AppPot\n  remedy: report it with the lines above\n")
    return EXIT_FAILED
