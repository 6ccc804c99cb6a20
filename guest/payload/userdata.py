"""User data: the text in which a cloud hands a job to its machine.

A script (`#!`), or JSON: the job description itself, or the same in plain words for people.  Both
may be compressed by gzip or written in base64.
"""

from __future__ import annotations

from binascii import Error as Base64Error
from binascii import a2b_base64

from apppot.guest.protocol.job import Job, JobError, Report
from apppot.guest.protocol.jsonlite import loads

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any

_MOST_BYTES = 64 << 20
_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\r\n")
_PLAIN_VERSION = 1


def parse(data: bytes) -> Job | None:
    """The job in user data; None where they are empty.  Raises JobError."""
    text = _unpack(data)
    if not text.strip():
        return None
    if text.startswith(b"#!"):
        return Job(script=text)
    if text.lstrip().startswith(b"{"):
        return described(text)
    begin = text.split(b"\n")[0][:40].decode("utf-8", "backslashreplace")
    raise JobError(f"user data that begin with {begin!r} are no job: give a script (#!) or JSON")


def _unpack(data: bytes) -> bytes:
    if data and _BASE64.issuperset(data):
        try:
            data = a2b_base64(data)
        except Base64Error as error:
            raise JobError(f"user data are not base64: {error}") from error
    if data[:2] != b"\x1f\x8b":
        return data
    import zlib

    try:
        return zlib.decompressobj(31).decompress(data, _MOST_BYTES)
    except zlib.error as error:
        raise JobError(f"user data are damaged: {error}") from error


def described(data: bytes) -> Job:
    """The job that JSON describes, in either form.  Raises JobError."""
    try:
        value: Any = loads(data.decode("utf-8"))
    except ValueError as error:
        raise JobError(f"not JSON: {error}") from error
    if isinstance(value, dict) and value.get("apppot") == _PLAIN_VERSION:
        return _plain({key: item for key, item in value.items() if key != "apppot"})
    return Job.load(data)


# What people write -> the type of it.
_WORDS: dict[str, type | tuple[type, ...]] = {
    "command": (str, list),
    "script": str,
    "env": dict,
    "workdir": str,
    "user": str,
    "hostname": str,
    "outputs": list,
    "report": dict,
}


def _plain(value: dict[str, Any]) -> Job:
    """The job of {"apppot": 1, "command": ["prog", "argument"], "env": {"NAME": "value"}, …}."""
    for key, item in value.items():
        if key not in _WORDS:
            raise JobError(f"unknown word {key!r}; known are {', '.join(_WORDS)}")
        if not isinstance(item, _WORDS[key]):
            raise JobError(f"{key} cannot be {item!r:.60}")
    job = Job(env={_bytes(name): _bytes(text) for name, text in value.get("env", {}).items()})
    command = value.get("command", [])
    if isinstance(command, str):
        command = ["/bin/sh", "-c", command]
    job.argv = [_bytes(word) for word in command]
    job.outputs = [_bytes(pattern) for pattern in value.get("outputs", [])]
    if "script" in value:
        job.script = _bytes(value["script"])
    if "workdir" in value:
        job.cwd = _bytes(value["workdir"])
    if "report" in value:
        job.report = Report.from_json(value["report"])
    job.user = value.get("user", job.user)
    job.hostname = value.get("hostname", job.hostname)
    return job


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise JobError(f"{text!r:.60} is no text")
    return text.encode("utf-8", "surrogateescape")
