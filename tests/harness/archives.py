"""Tar archives as the guest reads them."""

from __future__ import annotations

from pathlib import Path

from apppot.guest.merge import archive


def read(path: Path) -> dict[str, tuple[object, bytes]]:
    """name -> (list, data) of each member."""
    found: dict[str, tuple[object, bytes]] = {}
    with archive.opened(str(path)) as source:
        for member in source.members():
            listing = source.listing(member)
            data = b"" if listing is not None else b"".join(source.data(member.size))
            found[member.name.rstrip("/")] = (listing, data)
    return found
