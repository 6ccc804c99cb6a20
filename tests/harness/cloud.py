"""A cloud on loopback for the tests: metadata service with tokens, and a store that takes PUT.

With a certificate for it, the cloud speaks TLS.

`relay PORT` as a program joins its standard streams with that port: what QEMU's user network
starts for each of the guest's connections.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

TOKEN = "X-aws-ec2-metadata-token"


class Cloud(ThreadingHTTPServer):
    """`metadata` by path below /latest/; `stored` by path what was PUT, with its headers.

    The first PUT of each thing is answered with 503, as a store does that is busy.  `token` is the
    status of a request for a token; with 404 or 405 the service is of version 1.
    """

    daemon_threads = True

    def __init__(self, metadata: dict[str, bytes], token: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.metadata, self.token = metadata, token
        self.stored: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.refused: set[str] = set()
        self.tokens: set[str] = set()
        self.log: list[str] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Handler(BaseHTTPRequestHandler):
    server: Cloud

    def do_GET(self) -> None:
        self.server.log.append(f"GET {self.path}")
        if self.server.token == 200 and self.headers.get(TOKEN) not in self.server.tokens:
            self._answer(401)
            return
        data = self.server.metadata.get(self.path.removeprefix("/latest/"))
        self._answer(404 if data is None else 200, data or b"")

    def do_PUT(self) -> None:
        self.server.log.append(f"PUT {self.path}")
        data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        if self.path == "/latest/api/token":
            self._token()
        elif self.path not in self.server.refused:
            self.server.refused.add(self.path)
            self._answer(503)
        else:
            self.server.stored[self.path] = data, dict(self.headers)
            self._answer(200)

    def _token(self) -> None:
        if self.server.token != 200:
            self._answer(self.server.token)
            return
        if not self.headers.get(f"{TOKEN}-ttl-seconds", "").isdigit():
            self._answer(400)
            return
        token = secrets.token_hex(8)
        self.server.tokens.add(token)
        self._answer(200, token.encode())

    def _answer(self, status: int, data: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """The test's report has `log`."""


def certificate(path: Path, address: str) -> str:
    """Write key and certificate of a server at `address`; the certificate is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "store")])
    day = datetime.timedelta(days=1)
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    text = made.public_bytes(pem)
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + text,
    )
    return text.decode()


@contextmanager
def serving(
    metadata: dict[str, bytes], token: int = 200, certificate: Path | None = None
) -> Iterator[Cloud]:
    with Cloud(metadata, token) as cloud:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            cloud.socket = context.wrap_socket(cloud.socket, server_side=True)
        thread = threading.Thread(target=cloud.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield cloud
        finally:
            cloud.shutdown()
            thread.join()


def relay(port: int) -> None:
    """Join standard input and output with a port of this host."""
    with socket.create_connection(("127.0.0.1", port)) as peer:

        def outward() -> None:
            while data := os.read(0, 65536):
                peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)

        threading.Thread(target=outward, daemon=True).start()
        while data := peer.recv(65536):
            while data:
                data = data[os.write(1, data) :]


if __name__ == "__main__":
    relay(int(sys.argv[1]))
