"""A tree made into an image file."""

from __future__ import annotations

import contextlib
import os

from apppot.guest import tools
from apppot.guest.merge.accounts import without_generated
from apppot.guest.merge.root import find
from apppot.guest.merge.scratch import POINT, REFRESHED, rewrite

_MKFS_ENV = {
    # The file system's own date, which no file may be younger than.  -1 would mean "now".
    "SOURCE_DATE_EPOCH": str((1 << 64) - 2),
    # It fails where a layer knows no extended attributes.
    "LD_PRELOAD": "/usr/lib/llistxattr.so",
}
_LONGEST_NAME = 254  # one less than file systems allow


def make_image(tree: str, output: str) -> None:
    """Write `tree` as an EROFS image: the same bytes for the same tree."""
    check_names(os.fsencode(tree))
    uuid = "00000000-0000-4000-8000-617070706f74"
    options = ["--quiet", "-zlz4", "--preserve-mtime", "-x1", f"-U{uuid}"]
    try:
        tools.run("/usr/bin/mkfs.erofs", *options, output, tree, **_MKFS_ENV)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(output)
        raise


def check_names(tree: bytes) -> None:
    """Raise OSError where a name is too long for mkfs.erofs 1.5, which would cut it silently."""
    for folder, folders, files in os.walk(tree):
        for name in folders + files:
            if len(name) > _LONGEST_NAME:
                place = os.path.relpath(os.path.join(folder, name), tree)
                text = place.decode(errors="replace")
                raise OSError(f"a name has more than {_LONGEST_NAME} bytes: {text!r}")


def strip_generated(upper: str, points: list[str]) -> None:
    """Take the caller's account lines out of the session's own account files.

    The next run puts its caller's in again.
    """
    # With them the copies that account tools leave behind.
    for path in [*REFRESHED, *(f"{path}-" for path in REFRESHED)]:
        own = f"{upper}/{path}"
        if not os.path.isfile(own) or os.path.islink(own):
            continue
        base = find(points, path)
        with open(own, encoding="utf-8", errors="surrogateescape") as text:
            now = text.read()
        before = ""
        if base is not None:
            with open(base, encoding="utf-8", errors="surrogateescape") as text:
                before = text.read()
        cleaned = f"{POINT}/cleaned"
        with open(cleaned, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(without_generated(now, before))
        rewrite(own, cleaned)
        os.unlink(cleaned)
