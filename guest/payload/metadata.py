"""The metadata service of EC2 and of the clouds that imitate it.

Version 2: a token is asked for first.  Version 1 is taken only where the service itself says that
it knows no tokens.
"""

from __future__ import annotations

import socket

from apppot.guest.console import log
from apppot.guest.payload import userdata, web
from apppot.guest.payload.configdrive import Answer

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any

SERVICE = ("169.254.169.254", 80)
_CONNECT_SECONDS = 2.0
_TOKEN = "X-aws-ec2-metadata-token"
_PAUSES = (0.5, 1.0, 2.0)


def find() -> Answer | None:
    """The job in this machine's user data; None where no service answers or it has none.

    The network must be up.  Raises WebError for a service that fails, JobError for user data
    that are no job.
    """
    # Before `requests` is imported, which takes a machine without a cloud a second.
    try:
        socket.create_connection(SERVICE, _CONNECT_SECONDS).close()
    except OSError as error:
        log(f"no metadata service: {error}")
        return None
    headers = _token()
    if headers is None:
        log("the metadata service is not for this machine")
        return None
    job = userdata.parse(_get("user-data", headers))
    if job is None:
        log("the metadata service has no user data")
        return None
    instance, hostname = (
        _get(f"meta-data/{name}", headers).decode("utf-8", "replace").strip()
        for name in ("instance-id", "local-hostname")
    )
    return Answer("ec2", job, instance, hostname)


def _token() -> dict[str, str] | None:
    """The headers that every further request carries; None where the service is switched off."""
    answer = _ask("PUT", "api/token", {f"{_TOKEN}-ttl-seconds": "21600"})
    if answer.status_code == 403:
        return None
    return {_TOKEN: answer.text} if answer.status_code == 200 else {}


def _get(path: str, headers: dict[str, str]) -> bytes:
    answer = _ask("GET", path, headers)
    return bytes(answer.content) if answer.status_code == 200 else b""


def _ask(method: str, path: str, headers: dict[str, str]) -> Any:
    url = f"http://{SERVICE[0]}:{SERVICE[1]}/latest/{path}"
    return web.patiently(method, url, headers, pauses=_PAUSES, accepted=(403, 404, 405))
