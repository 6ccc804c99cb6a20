"""JSON without `json`.

`json` imports `re`, which costs the guest 6 ms on its way to the payload.  The interpreter's
own C scanner does the same work; where an interpreter has none, `json` itself is used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any, Union

    Json = Union[None, bool, int, float, str, "list[Json]", "dict[str, Json]"]


class _Context:
    """What the C scanner asks of a decoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float


def loads(text: str) -> Json:
    """Decode one JSON document.  Raises ValueError when it is malformed."""
    try:
        from _json import make_scanner
    except ImportError:
        import json

        fallback: Json = json.loads(text)
        return fallback
    body = text.strip()
    try:
        value, end = make_scanner(_Context())(body, 0)  # type: ignore[arg-type]
    except StopIteration as error:
        raise ValueError(f"malformed JSON at offset {error.value}") from None
    if end != len(body):
        raise ValueError(f"malformed JSON: trailing data at offset {end}")
    result: Json = value
    return result


def dumps(value: Any) -> str:
    """Encode `value` as ASCII JSON.  Raises TypeError for what JSON has no word for."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([dumps(item) for item in value]) + "]"
    if isinstance(value, dict):
        return "{" + ",".join([_quote(k) + ":" + dumps(v) for k, v in value.items()]) + "}"
    raise TypeError(f"not a JSON value: {type(value).__name__}")


def _quote(text: str) -> str:
    try:
        from _json import encode_basestring_ascii
    except ImportError:
        from json.encoder import py_encode_basestring_ascii as encode_basestring_ascii
    quoted: str = encode_basestring_ascii(text)
    return quoted
