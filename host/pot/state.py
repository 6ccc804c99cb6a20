"""Small files of state: versioned JSON that is never seen half-written."""

from __future__ import annotations

import json
import os
from contextlib import suppress


def read_json(path: str, version: int = 1) -> dict[str, object] | None:
    """The JSON object in `path`; None where it is missing, damaged or of another version."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict) or value.get("version") != version:
        return None
    return value


def write_json(path: str, value: dict[str, object]) -> None:
    """Replace `path` by `value` with its "version" 1; makes the folder.  Raises OSError."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    text = json.dumps({"version": 1, **value}, indent=1, sort_keys=True) + "\n"
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def sync_folder(path: str) -> None:
    """Make a rename into the folder last through a crash of the host."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
