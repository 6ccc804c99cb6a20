"""What the lab's own system offers guests on their network: a name by DNS, and HTTP.

GET gives numbers, POST the checksum of what is posted.  It runs till it is killed.
"""

from __future__ import annotations

import hashlib
import http.server
import socket
import sys
import threading

NUMBERS = b"".join(b"%d\n" % number for number in range(1, 200_001))
A_RECORD = b"\0\1\0\1"


class Numbers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(NUMBERS)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(hashlib.sha256(data).hexdigest().encode() + b"\n")

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *values: object) -> None:
        pass


def resolve(queries: socket.socket, address: str) -> None:
    """Answer every question after an address (IPv4) with this one."""
    while True:
        query, client = queries.recvfrom(512)
        question = query[12 : query.index(b"\0", 12) + 5]
        found = question.endswith(A_RECORD)
        answer = query[:2] + b"\x81\x80\0\1" + bytes([0, found]) + bytes(4) + question
        if found:
            answer += b"\xc0\x0c" + A_RECORD + b"\0\0\0\x3c\0\4" + socket.inet_aton(address)
        queries.sendto(answer, client)


def main(address: str) -> None:
    server = http.server.ThreadingHTTPServer(("", 8000), Numbers)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as queries:
        queries.bind((address, 53))
        threading.Thread(target=resolve, args=(queries, address), daemon=True).start()
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
