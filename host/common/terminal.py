"""The caller's terminal: raw while it shows a guest's, and restored whatever happens."""

from __future__ import annotations

import os
import termios
from typing import Any


def is_terminal(fd: int) -> bool:
    """Whether `fd` is open and a terminal."""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def size(fd: int) -> tuple[int, int]:
    """Rows and columns; 24 by 80 where the terminal does not say."""
    try:
        columns, rows = os.get_terminal_size(fd)
    except OSError:
        return 24, 80
    return rows or 24, columns or 80


class Terminal:
    """A terminal that can be switched to raw mode and back.

    Never waits for what is still to be shown: a terminal that nobody reads must not hold us.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._saved = termios.tcgetattr(fd)

    def settings(self) -> str:
        """Its settings in the form of `stty -g`, for one who restores them in our place."""
        iflag, oflag, cflag, lflag, _, _, characters = self._saved
        words = [f"{flag:x}" for flag in (iflag, oflag, cflag, lflag)]
        return ":".join([*words, *[f"{_code(character):x}" for character in characters]])

    def raw(self) -> None:
        """Pass every key on as it is (cfmakeraw)."""
        attributes = [*self._saved[:6], list(self._saved[6])]
        attributes[0] &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        attributes[1] &= ~termios.OPOST
        attributes[2] = attributes[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        attributes[3] &= ~(
            termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN
        )
        attributes[6][termios.VMIN], attributes[6][termios.VTIME] = 1, 0
        self._set(attributes)

    def restore(self) -> None:
        """Put it back as it was."""
        self._set(self._saved)

    def _set(self, attributes: list[Any]) -> None:
        """Change the settings; a terminal that is gone needs nothing."""
        try:
            termios.tcsetattr(self.fd, termios.TCSANOW, attributes)
        except termios.error:
            pass


def _code(character: bytes | int) -> int:
    return character if isinstance(character, int) else character[0]
