"""The command `apppot`: finds the subcommand, imports only its module, turns errors into exits.

Launcher imports are a budget (see benchmarks): nothing here may pull in what `run` does not need.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from apppot.host.errors import EXIT_FAILED, ApppotError

# Subcommand -> (module in apppot.host.commands, one line of help).  A module offers
# configure(parser), which adds the arguments and set_defaults(func=...); func(args) returns
# the exit status.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "run a command in a virtual machine"),
    "console": ("run", "open a console in a virtual machine"),
    "doctor": ("doctor", "say what this machine can do, and what to mend"),
    "image": ("image", "build, import and list images"),
    "kernel": ("kernel", "build the guest kernel"),
    "pot": ("pot", "build, export and import the pot (kernel and runtime)"),
    "completion": ("completion", "print a shell completion script"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that fails with exit 125 and suggests the option that was meant."""

    def error(self, message: str) -> NoReturn:
        hint = suggestion(message, list(self._option_string_actions))
        sys.stderr.write(f"{self.prog}: {message}{hint}\n  remedy: see `{self.prog} --help`\n")
        raise SystemExit(EXIT_FAILED)


def suggestion(message: str, known: Sequence[str]) -> str:
    """For "unrecognized arguments: --tiem 5" and the like: the nearest known option."""
    import difflib

    for word in message.split():
        if word.startswith("-") or message.startswith("argument command: invalid choice"):
            near = difflib.get_close_matches(word.split("=")[0].strip("'"), known, 1)
            if near:
                return f" (did you mean {near[0]}?)"
    return ""


def build_parser(only: str | None = None) -> Parser:
    """The whole parser, or with `only` one whose other subcommands are left out."""
    parser = Parser(
        prog="apppot",
        description="Run a Linux virtual machine as if it were a program.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.set_defaults(func=None)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, (module_name, text) in COMMANDS.items():
        if only is not None and name != only:
            continue
        module = importlib.import_module(f"apppot.host.commands.{module_name}")
        sub = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
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
    parser = build_parser(first if first in COMMANDS else None)
    if first is not None and not first.startswith("-") and first not in COMMANDS:
        hint = suggestion(f"argument command: invalid choice {first}", list(COMMANDS))
        sys.stderr.write(f"apppot: unknown command {first!r}{hint}\n  remedy: `apppot --help`\n")
        return EXIT_FAILED
    args = parser.parse_args(argv)
    if args.version:
        print(f"apppot {version()}")
        return 0
    if args.func is None:
        parser.print_help()
        return 0
    status: int = args.func(args)
    return status


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point; the one place where the launcher turns an error into an exit."""
    try:
        status = dispatch(sys.argv[1:] if argv is None else argv)
    except ApppotError as error:
        sys.stderr.write(f"apppot: {error}\n")
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    raise SystemExit(status)
