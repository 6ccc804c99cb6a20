"""A real web server on loopback for a static folder, which can be told to misbehave."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

# Given the path and the bytes that are to be sent: what is sent instead, or None to hang up.
Fault = Callable[[str, bytes], bytes | None]


class Server(ThreadingHTTPServer):
    """Serves `root`; counts requests and bytes; `ranges` as most servers, or as the simplest."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, root: Path, ranges: bool = True, address: str = "127.0.0.1") -> None:
        super().__init__((address, 0), Handler)
        self.root = root
        self.ranges = ranges
        self.fault: Fault | None = None
        self.requests: list[str] = []
        self.sent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def count(self, prefix: str) -> int:
        return sum(path.startswith(f"/{prefix}") for path in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    """GET with Range and keep-alive."""

    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests.append(self.path)
        try:
            with open(self.server.root / unquote(self.path).lstrip("/"), "rb") as handle:
                self._send(handle.fileno())
        except (FileNotFoundError, IsADirectoryError):
            self.send_error(404)

    def _send(self, handle: int) -> None:
        size = os.fstat(handle).st_size
        start, end = 0, size
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match and self.server.ranges:
            start, end = int(match[1]), min(size, int(match[2]) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.flush()
        self._body(handle, start, end)

    def _body(self, handle: int, start: int, end: int) -> None:
        if self.server.fault is not None:
            data = self.server.fault(self.path, os.pread(handle, end - start, start))
            if data is not None:
                self.connection.sendall(data)
            self.close_connection = data is None or len(data) != end - start
            self._sent(len(data or b""))
            return
        while start < end:
            sent = os.sendfile(self.connection.fileno(), handle, start, end - start)
            start += sent
            self._sent(sent)

    def _sent(self, size: int) -> None:
        with self.server.lock:
            self.server.sent += size

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def serving(root: Path, ranges: bool = True) -> Iterator[Server]:
    """A server for `root` in a thread."""
    server = Server(root, ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
