"""HTTP for a guest without a launcher, with `requests`: metadata of a cloud, posting of results."""

from __future__ import annotations

import time

from apppot.guest.console import log

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

# Between attempts, in seconds: a service that restarts is back in a minute.
PAUSES = (1, 2, 4, 8, 16, 32)
# (to connect, between two bytes), in seconds.
TIMEOUT = (10, 60)
_TRY_AGAIN = (408, 425, 429)
# OpenSSL's words for another's certificate, and for a file that has none.
_NOT_KNOWN, _NO_CERTIFICATE = "CERTIFICATE_VERIFY_FAILED", "[X509"


class WebError(OSError):
    """A service does not answer, or refuses."""


def library() -> Any:
    """The package `requests`.  Raises WebError where an image that carries the agent lacks it."""
    import site

    site.main()  # the agent runs without site packages
    try:
        import requests
    except ImportError as error:
        raise WebError("this image has no python3-requests") from error
    return requests


def patiently(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: Callable[[], Any] = lambda: None,
    pauses: tuple[float, ...] | None = None,
    accepted: tuple[int, ...] = (),
    authorities: str | None = None,
) -> Any:
    """The response to a request, which is repeated while that may help.

    `body` gives the body anew for each attempt.  `accepted` are statuses of 400 and above that are
    an answer.  `authorities` is a file with the certificates that are believed instead of the
    public ones.  Raises WebError when all attempts failed, and at once where the service says that
    the request is wrong, or cannot prove who it is.
    """
    requests = library()
    with requests.Session() as session:
        session.trust_env = False  # PID 1 has the kernel's words in its environment
        session.verify = authorities or True
        for pause in (*(PAUSES if pauses is None else pauses), None):
            problem, final = "", False
            try:
                request = {"headers": dict(headers), "data": body(), "timeout": TIMEOUT}
                answer = session.request(method, url, **request)
                if answer.status_code < 400 or answer.status_code in accepted:
                    return answer
                problem = f"status {answer.status_code}"
                final = answer.status_code < 500 and answer.status_code not in _TRY_AGAIN
            except requests.RequestException as error:
                problem = f"{error}"
                final = _NOT_KNOWN in problem or _NO_CERTIFICATE in problem
            # What follows the question mark may be a secret.
            shown, _, secret = url.partition("?")
            problem = problem.replace(secret, "…") if secret else problem
            if final or pause is None:
                raise WebError(f"{method} {shown}: {problem}")
            log(f"{method} {shown}: {problem}; again in {pause} s")
            time.sleep(pause)
    raise AssertionError("unreachable")
