"""What the agent adds to account files, and how it is left out of what is saved."""

from __future__ import annotations

from apppot.guest.protocol.job import USER


def without_generated(text: str, base: str) -> str:
    """An account file of a session as it goes into changes, where `base` is the image's own.

    The line of `user` becomes the image's again, or none; groups made for a caller go.
    """
    lines = [line for line in text.splitlines() if not is_generated(line)]
    own = [line for line in base.splitlines() if line.split(":")[0] == USER]
    at = base.splitlines().index(own[0]) if own else 0
    return "".join(f"{line}\n" for line in [*lines[:at], *own, *lines[at:]])


def is_generated(line: str) -> bool:
    """A line for `user`, or of a group that was made for a caller: no password, only `user`."""
    fields = line.split(":")
    return fields[0] == USER or (len(fields) == 4 and fields[1] == "*" and fields[3] == USER)
