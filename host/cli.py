"""The command `apppot`: finds the subcommand, imports only its module, turns errors into exits.

Launcher imports are a budget (see benchmarks): nothing here may pull in what `run` does not need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from apppot.host.commands.parser import nearest
from apppot.host.commands.table import COMMANDS, build_parser, version
from apppot.host.common.errors import EXIT_FAILED, Aborted, ApppotError


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
    except Aborted as error:
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    except Exception:
        status = _unexpected()
    raise SystemExit(status)


def _unexpected() -> int:
    """The exit status for what is no ApppotError: never 1, which would be a payload's own."""
    import traceback

    traceback.print_exc()
    sys.stderr.write("apppot: this is a bug of AppPot\n  remedy: report it with the lines above\n")
    return EXIT_FAILED
