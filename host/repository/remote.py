"""HTTP to a repository's mirrors: small files whole, packs in ranges, the next on failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from apppot.host.common.errors import RepositoryError
from apppot.host.common.text import printable

if TYPE_CHECKING:
    import requests

T = TypeVar("T")

CONNECT_SECONDS = 10.0
# Without a byte for so long, a server counts as gone.
READ_SECONDS = 30.0
SMALL_FILE_SECONDS = 300.0
BLOCK = 256 << 10
# `identity`: a digest is over the bytes of the file, not over a server's compression of them.
HEADERS = {"Accept-Encoding": "identity"}
# Squid and its like must ask the server before they hand out an index again.
FRESH = {**HEADERS, "Cache-Control": "no-cache"}


class Unreachable(RepositoryError):
    """A server did not give what was asked for."""


class Missing(Unreachable):
    """A server answered that it has no such file."""


class Web:
    """HTTP sessions, one per thread; `close` ends them all, also in the middle of a read."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._sessions: list[requests.Session] = []

    def _session(self) -> requests.Session:
        import requests

        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            self._sessions.append(session)
        return session

    def close(self) -> None:
        """End all connections."""
        for session in self._sessions:
            session.close()

    @contextmanager
    def _get(self, url: str, headers: dict[str, str]) -> Iterator[requests.Response]:
        import requests
        import urllib3

        try:
            with self._session().get(
                url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)
            ) as answer:
                if answer.status_code in (404, 410):
                    raise Missing(f"{url} is not there (HTTP {answer.status_code})")
                if answer.status_code not in (200, 206):
                    raise Unreachable(f"{url}: HTTP {answer.status_code} {answer.reason}"[:300])
                yield answer
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Unreachable(f"{url}: {_reason(error)}", "try later, or another mirror") from None

    def small(self, url: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes.  Raises Unreachable, RepositoryError."""
        deadline = time.monotonic() + SMALL_FILE_SECONDS
        with self._get(url, FRESH) as answer:
            parts, size = [], 0
            while data := answer.raw.read(BLOCK, decode_content=False):
                parts.append(data)
                size += len(data)
                if size > limit:
                    raise RepositoryError(f"{url} is absurdly large: over {limit} bytes")
                if time.monotonic() > deadline:
                    raise Unreachable(f"{url}: too slow", "try later, or another mirror")
            expected = answer.headers.get("Content-Length", str(size))
            if expected != str(size):
                raise Unreachable(f"{url} ended early: {size} of {expected} bytes")
        return b"".join(parts)

    @contextmanager
    def span(self, url: str, start: int, end: int) -> Iterator[Body]:
        """The bytes [start, end) of a file, to be read one after the other.

        A server without ranges sends the whole file: what comes before is read and dropped.
        """
        headers = {**HEADERS, "Range": f"bytes={start}-{end - 1}"}
        with self._get(url, headers) as answer:
            body = Body(answer.raw, url, end - start)
            if answer.status_code == 206:
                given = answer.headers.get("Content-Range", "")
                if not given.startswith(f"bytes {start}-"):
                    raise Unreachable(f"{url}: asked for bytes from {start}, got {given[:60]!r}")
            else:
                body.left = end
                body.skip(start)
            yield body


class Body:
    """Reads exact numbers of bytes from an answer; short answers raise Unreachable."""

    def __init__(self, raw: Any, url: str, left: int) -> None:
        self.left = left
        self._raw = raw
        self._url = url
        self._buffer = b""
        self._at = 0

    def read(self, size: int) -> bytes:
        """The next `size` bytes."""
        if len(self._buffer) - self._at < size:
            self._fill(size)
        data = self._buffer[self._at : self._at + size]
        self._at += size
        return data

    def _fill(self, size: int) -> None:
        parts = [self._buffer[self._at :]]
        have = len(parts[0])
        while have < size:
            block = self._raw.read(min(max(BLOCK, size - have), self.left), decode_content=False)
            if not block:
                raise Unreachable(f"{self._url} ended early", "try later, or another mirror")
            parts.append(block)
            have += len(block)
            self.left -= len(block)
        self._buffer, self._at = b"".join(parts), 0

    def skip(self, size: int) -> None:
        """Drop the next `size` bytes."""
        while size > 0:
            size -= len(self.read(min(size, BLOCK)))


def _reason(error: BaseException) -> str:
    """The root of a chain of wrapped exceptions, in a few words."""
    while (inner := getattr(error, "reason", None) or error.__cause__ or error.__context__) and (
        isinstance(inner, BaseException)
    ):
        error = inner
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(str(text))


class Mirrors:
    """The servers that may hold a repository's files, the best first.

    All they serve is checked against digests that a trusted key signed, so any of them may
    answer for any file.
    """

    def __init__(self, web: Web, urls: Sequence[str]) -> None:
        self.web = web
        self._urls = list(dict.fromkeys(urls))
        self._lock = threading.Lock()

    def order(self) -> list[str]:
        """The URLs, those that failed last at the end."""
        with self._lock:
            return list(self._urls)

    def blame(self, url: str) -> None:
        """Ask this one last from now on."""
        with self._lock:
            self._urls.remove(url)
            self._urls.append(url)

    def checked(self, path: str, limit: int, decode: Callable[[bytes], T]) -> T:
        """A small file from the first mirror whose copy `decode` accepts.

        Raises the last mirror's RepositoryError.
        """
        failure: RepositoryError = RepositoryError("no repository is configured")
        for url in self.order():
            try:
                return decode(self.web.small(f"{url}/{path}", limit))
            except RepositoryError as error:
                failure = error
                self.blame(url)
        raise failure
