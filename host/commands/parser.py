"""An argument parser that fails with exit 125 and suggests the word that was meant."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from apppot.host.common.errors import EXIT_FAILED, ApppotError


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
