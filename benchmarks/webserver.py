"""A static web server that is no bottleneck: sendfile, ranges, kept connections.

webserver.py FOLDER

It prints the port that it listens on, on all addresses.
"""

from __future__ import annotations

import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves the files below `root`, each connection in a thread."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path) -> None:
        super().__init__(("", 0), Handler)
        self.root = root


class Handler(BaseHTTPRequestHandler):
    """GET, with one range."""

    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        try:
            with open(self.server.root / self.path.lstrip("/"), "rb") as file:
                self._send(file.fileno())
        except (FileNotFoundError, IsADirectoryError):
            self.send_error(404)

    def _send(self, file: int) -> None:
        size = os.fstat(file).st_size
        start, end = 0, size
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            start, end = int(match[1]), min(size, int(match[2]) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.flush()
        while start < end:
            start += os.sendfile(self.connection.fileno(), file, start, end - start)

    def log_message(self, *_: object) -> None:
        """Quiet."""


if __name__ == "__main__":
    server = Server(Path(sys.argv[1]))
    print(server.server_address[1], flush=True)
    server.serve_forever()
