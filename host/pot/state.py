"""Small files of state: versioned JSON that is never seen half-written."""

from __future__ import annotations

import json

from apppot.host.common.files import write_atomic


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
    text = json.dumps({"version": 1, **value}, indent=1, sort_keys=True) + "\n"
    write_atomic(path, text.encode(), None)
