"""All subcommands, and the parser of a command line."""

from __future__ import annotations

import argparse
import importlib

from apppot.host.commands.parser import Parser

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
