"""Screen and keyboard of a PC in QEMU: what a user of VirtualBox has of a machine."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from apppot.host.hypervisor.qmp import Monitor

# VGA text memory: it scrolls by moving where the picture begins.
TEXT_AT, TEXT_BYTES, TEXT_WIDTH = 0xB8000, 0x8000, 80
# A letter of the kernel on a frame buffer, in pixels.
WIDTH, HEIGHT = 8, 16
HOLD_MS = 30
KEYS = {
    " ": "spc",
    "\n": "ret",
    "-": "minus",
    ".": "dot",
    "/": "slash",
    ";": "semicolon",
    "$": "shift 4",
    "(": "shift 9",
    ")": "shift 0",
    ">": "shift dot",
}


class Screen:
    """`words` and `fd` are for QEMU's command line and its descriptors; `place` is a folder."""

    def __init__(self, place: Path) -> None:
        self._file = place / "screen"
        self._ours, self._theirs = socket.socketpair()
        self._monitor = Monitor(self._ours)
        self.fd = self._theirs.fileno()
        self.words = ["-chardev", f"socket,id=monitor,fd={self.fd}"]
        self.words += ["-mon", "chardev=monitor,mode=control", "-device", "VGA"]

    def connect(self) -> None:
        """Take over the monitor of a QEMU that has been started."""
        self._theirs.close()
        self._monitor.connect()

    def close(self) -> None:
        self._ours.close()

    def type(self, text: str) -> None:
        """Press the keys of a keyboard of the United States."""
        for letter in text:
            names = KEYS.get(letter, f"shift {letter.lower()}" if letter.isupper() else letter)
            self.press(*names.split())

    def press(self, *names: str) -> None:
        """Press these keys at once."""
        keys = [{"type": "qcode", "data": name} for name in names]
        wishes: dict[str, Any] = {"keys": keys, "hold-time": HOLD_MS}
        self._monitor.order("send-key", **wishes)

    def running(self) -> bool:
        """Whether the machine has not powered itself off; QEMU stays, with -no-shutdown."""
        return bool(self._monitor.order("query-status")["running"])

    def quit(self) -> None:
        """End QEMU."""
        self._monitor.order("quit")

    def text(self) -> str:
        """What has been on a VGA screen in text mode, without its margins; scrolled lines, too."""
        place = str(self._file)
        self._monitor.order("pmemsave", val=TEXT_AT, size=TEXT_BYTES, filename=place)
        letters = self._file.read_bytes()[::2].decode("cp437")
        rows = range(0, len(letters), TEXT_WIDTH)
        return "\n".join(letters[at : at + TEXT_WIDTH].rstrip() for at in rows).strip()

    def shows(self, text: str) -> bool:
        """Whether a line of the picture has `text`, whatever its letters look like.

        That is: the same picture wherever the same letter is due, another for another.
        """
        return any(
            _same_pattern(row[at : at + len(text)], text)
            for row in self._cells()
            for at in range(len(row) - len(text) + 1)
        )

    def _cells(self) -> list[list[bytes]]:
        self._monitor.order("screendump", filename=str(self._file))
        kind, size, _, pixels = self._file.read_bytes().split(b"\n", 3)
        assert kind == b"P6"
        width, height = map(int, size.split())
        lines = [pixels[at : at + width * 3] for at in range(0, len(pixels), width * 3)]
        return [
            [
                b"".join(line[left * 3 : (left + WIDTH) * 3] for line in lines[top : top + HEIGHT])
                for left in range(0, width - WIDTH + 1, WIDTH)
            ]
            for top in range(0, height - HEIGHT + 1, HEIGHT)
        ]


def _same_pattern(cells: list[bytes], text: str) -> bool:
    pairs = set(zip(cells, text, strict=True))
    return len(pairs) == len({cell for cell, _ in pairs}) == len({letter for _, letter in pairs})
