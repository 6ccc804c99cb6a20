"""What others wrote, for the user's terminal."""

from __future__ import annotations


def printable(text: str, most: int = 200) -> str:
    """`text` without what a terminal would act on, in at most `most` characters."""
    return "".join(character if character.isprintable() else "?" for character in text[:most])
