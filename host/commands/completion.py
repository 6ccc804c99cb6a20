"""`apppot completion`: shell completion scripts, made from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from apppot.host.common.errors import UsageError

SHELLS = ("bash", "zsh", "fish", "tcsh")

# What an argument with this metavar is completed by; see `_completer`.
_FILES = ("FILE", "FILE.tar", "SRC:DST[:ro]", "RECIPE")
_DIRECTORIES = ("DIR",)
_IMAGES = ("IMAGE",)

# Asks at each completion, so that an image is offered as soon as it is there.
_NAMES = "apppot completion --images 2>/dev/null"
IMAGE_FUNCTION = {
    "bash": "_apppot_images",
    "zsh": "_apppot_images",
    "fish": f"({_NAMES})",
    "tcsh": f"`{_NAMES}`",
}
PREAMBLE = {
    "bash": f'_apppot_images() {{ compgen -W "$({_NAMES})" -- "$1"; compgen -f -- "$1"; }}\n',
    "zsh": f'_apppot_images() {{ compadd -- ${{(f)"$({_NAMES})"}}; _files }}\n',
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `apppot completion`."""
    parser.add_argument("shell", metavar="SHELL", nargs="?", choices=SHELLS, help=", ".join(SHELLS))
    parser.add_argument("--images", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Print the script, or (hidden, for the scripts) the words that IMAGE can be."""
    if args.images:
        print("\n".join(image_names()))
        return 0
    if args.shell is None:
        raise UsageError("which shell?", f"apppot completion {' | '.join(SHELLS)}")
    print(script(args.shell))
    return 0


def image_names() -> list[str]:
    """The names of all images, `host` among them."""
    from apppot.host.images import store

    return ["host", *sorted({record.name for _, record in store.list_images()})]


def script(shell: str) -> str:
    """The completion script for `shell`, one of SHELLS.  Raises UsageError without shtab."""
    try:
        import shtab
    except ImportError as error:
        raise UsageError("shtab is not installed", "pip install shtab") from error
    from apppot.host.commands.table import build_parser

    parser = build_parser()
    _complete(parser)
    preamble: Any = {shell: PREAMBLE[shell]} if shell in PREAMBLE else ""
    return shtab.complete(parser, shell=shell, preamble=preamble)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Say of each argument below `parser` what completes it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                _complete(sub)
        completer = _completer(action.metavar)
        if completer is not None:
            action.complete = completer  # type: ignore[attr-defined]


def _completer(metavar: str | tuple[str, ...] | None) -> Mapping[str, Any] | None:
    import shtab

    if metavar in _FILES:
        return shtab.FILE
    if metavar in _DIRECTORIES:
        return shtab.DIRECTORY
    return IMAGE_FUNCTION if metavar in _IMAGES else None
