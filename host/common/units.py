"""Sizes and durations as people write them, and times as records have them."""

from __future__ import annotations

import time

from apppot.host.common.errors import UsageError

_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, unit: str = "") -> int:
    """Bytes for "512M", "4GiB", "1.5g"; a bare number is in `unit`.  Raises UsageError."""
    word = text.strip().upper().removesuffix("IB").removesuffix("B")
    suffix = word[-1:] if word[-1:] in _SIZES and word[-1:] else ""
    number = word[: len(word) - len(suffix)]
    try:
        value = float(number) * _SIZES[suffix or unit]
    except ValueError:
        raise UsageError(f"{text!r} is not a size", "write it like 512M or 4G") from None
    if not 0 < value < 1 << 60:
        raise UsageError(f"{text!r} is not a size that a machine can have", "write 512M or 4G")
    return int(value)


def parse_duration(text: str) -> float:
    """Seconds for "90", "90s", "5m", "1h30m", "2d", "HH:MM:SS" or "D-HH:MM:SS".

    Raises UsageError.
    """
    try:
        seconds = _clock(text) if ":" in text or "-" in text else _words(text)
    except ValueError:
        hint = "write it like 90s, 5m, 2h or 01:30:00"
        raise UsageError(f"{text!r} is not a duration", hint) from None
    if not 0 < seconds < 1e9:
        raise UsageError(f"{text!r} is not a usable duration", "write it like 90s, 5m or 2h")
    return seconds


def _clock(text: str) -> float:
    days, dash, rest = text.rpartition("-")
    if dash and not days.isdigit():
        raise ValueError(text)
    seconds = 0.0
    for part in rest.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + (int(days) * 86400 if days else 0)


def _words(text: str) -> float:
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    seconds, number = 0.0, ""
    for letter in text.strip().lower():
        if letter in units:
            seconds += float(number) * units[letter]
            number = ""
        else:
            number += letter
    return seconds + (float(number) if number else 0.0)


def format_size(size: float) -> str:
    """A number of bytes for people: "512 MiB", "58.1 MiB" (powers of 1024)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def timestamp(seconds: float | None = None) -> str:
    """A time (since 1970; None: now) as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
