"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

BAR_WIDTH = 30
REDRAW_SECONDS = 0.1
PLAIN_LINE_SECONDS = 15.0


class Progress:
    """One long step.  `update(done)` as it goes; `total` 0 means that its length is unknown.

    Writes to stderr, so that a script's stdout stays clean.  Use as a context manager: leaving
    prints how long the step took, or that it failed.
    """

    def __init__(self, title: str, total: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self.note = ""
        self._started = time.monotonic()
        self._drawn = 0.0
        self._bar = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if not self._bar:
            self._line(f"{self.title} …")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        seconds = time.monotonic() - self._started
        verdict = "failed after" if kind else "done in"
        if self._bar:
            sys.stderr.write("\r\033[K")
        self._line(f"{self.title}: {verdict} {seconds:.1f} s")

    def update(self, done: int, note: str = "") -> None:
        """Report `done` of `total` units, with a word on what is being worked at."""
        self.done = done
        self.note = note
        now = time.monotonic()
        if now - self._drawn < (REDRAW_SECONDS if self._bar else PLAIN_LINE_SECONDS):
            return
        self._drawn = now
        self._draw()

    def advance(self, note: str = "") -> None:
        """Report one more unit."""
        self.update(self.done + 1, note)

    def _fraction(self) -> float:
        return min(1.0, self.done / self.total) if self.total else 0.0

    def _draw(self) -> None:
        percent = f"{100 * self._fraction():3.0f} %" if self.total else f"{self.done}"
        if not self._bar:
            self._line(f"{self.title}: {percent}")
            return
        filled = round(BAR_WIDTH * self._fraction())
        bar = "█" * filled + "░" * (BAR_WIDTH - filled) if self.total else "…"
        sys.stderr.write(f"\r\033[K{self.title} {bar} {percent} {self.note[:40]}")
        sys.stderr.flush()

    @staticmethod
    def _line(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
