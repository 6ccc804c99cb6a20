"""Files that appear whole or not at all, and last through a crash of the host."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from apppot.host.common.errors import ApppotError

# How the hidden names of files end that are not whole yet.
PARTIAL = ".partial"


def write_atomic(
    path: str, content: bytes, mode: int | None = 0o644, *, durable: bool = True
) -> None:
    """Put `content` in place in one step: temporary file, fsync, rename, fsync.

    Makes missing folders.  Its mode is `mode`; None: what the umask leaves.  What is not `durable`
    may be gone after a crash of the host.  Raises OSError.
    """
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{os.urandom(8).hex()}{PARTIAL}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    handle = os.open(temporary, flags, 0o666 if mode is None else 0o600)
    try:
        with open(handle, "wb") as out:
            out.write(content)
            out.flush()
            if durable:
                os.fsync(handle)
            if mode is not None:
                os.fchmod(handle, mode)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync(folder)


def sync(path: str) -> None:
    """Make a file's contents, or the names in a folder, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(
    path: str,
    value: Mapping[str, Any],
    mode: int | None = None,
    *,
    version: int = 1,
    key: str = "version",
    durable: bool = True,
) -> None:
    """Write an object with its version under `key`, as `write_atomic` does."""
    text = json.dumps({key: version, **value}, indent=1, sort_keys=True) + "\n"
    write_atomic(path, text.encode(), mode, durable=durable)


def read_json(path: str, version: int = 1) -> dict[str, Any] | None:
    """The object that `write_json` wrote; None where it is missing, damaged or of another version.

    For what can be had again.
    """
    try:
        value = _load(path)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and value.get("version") == version else None


def require_json(
    path: str, error: type[ApppotError], remedy: str, *, key: str = "version", version: int = 1
) -> dict[str, Any] | None:
    """The object that `write_json` wrote; None where there is none.

    For what cannot be had again: damage, and what a newer AppPot wrote, is no absence: it raises
    `error` with `remedy`.
    """
    try:
        value = _load(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {problem}", remedy) from None
    if not isinstance(value, dict) or not isinstance(value.get(key), int):
        raise error(f"{path} is damaged", remedy)
    if value[key] > version:
        raise error(f"{path} was written by a newer AppPot", "update this AppPot")
    return value


def _load(path: str) -> object:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` into a pipe or file; a disk that is just filling up takes a part first.

    Raises OSError.
    """
    done = 0
    with memoryview(data) as view:
        while done < len(view):
            done += os.write(descriptor, view[done:])


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` into a file at `offset`.  Raises OSError."""
    done = 0
    with memoryview(data) as view:
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], offset + done)
