"""The kernel's serial line, which carries the channel: it goes on reading after a slow reader."""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
import time
from pathlib import Path

import pytest
from apppot.host.pot import layout

from tests.harness.vm import RELEASE

# More than a terminal line of the guest and its buffers hold, so that each round throttles it.
PIECE = 200_000
ROUNDS = 3

GUEST = f"""
import os, termios, time, zlib
fd = os.open("/dev/ttyS0", os.O_RDWR | os.O_NOCTTY)
mode = termios.tcgetattr(fd)
mode[0] = mode[1] = mode[3] = 0
mode[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
termios.tcsetattr(fd, termios.TCSANOW, mode)
os.write(fd, os.uname().release.encode() + b"\\n")
for number in range({ROUNDS}):
    # The host has written more than fits by the time that this reads on.
    while os.read(fd, 1) != b"<":
        pass
    time.sleep(0.5)
    check, count = 0, 0
    while count < {PIECE}:
        data = os.read(fd, min(4096, {PIECE} - count))
        check, count = zlib.crc32(data, check), count + len(data)
    os.write(fd, b"%d\\n" % check)
os.write(fd, b"end\\n")
time.sleep(60)
"""


def read_line(channel: socket.socket, seconds: float) -> bytes:
    line = bytearray()
    deadline = time.monotonic() + seconds
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([channel], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"the guest went silent after {bytes(line)!r}"
        line += channel.recv(1)
    return bytes(line).strip()


@pytest.mark.timeout(120)
def test_a_reader_that_was_slow_gets_the_rest(tmp_path: Path) -> None:
    import zlib

    pot = layout.find_pot()
    script = tmp_path / "script"
    script.write_bytes(GUEST.encode().ljust(8192, b"\n"))
    ours, theirs = socket.socketpair()
    words = ["mem=128M", f"ubd0rsc={pot.runtime}", f"ubd1rsc={script}", "root=/dev/ubda", "ro"]
    words += ["rootfstype=ext4", "init=/usr/bin/python3.11", "con=null", "con0=null,fd:2"]
    words += ["seccomp=on", f"ssl0=fd:{theirs.fileno()}", f"uml_dir={tmp_path}/"]
    with subprocess.Popen(
        [pot.kernel.path, *words, "--", "-IS", "/dev/ubdb"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    ) as guest:
        try:
            theirs.close()
            assert read_line(ours, 60).decode().startswith(RELEASE)
            for number in range(ROUNDS):
                data = random.Random(number).randbytes(PIECE)
                ours.sendall(b"<" + data)
                assert int(read_line(ours, 30)) == zlib.crc32(data)
            assert read_line(ours, 30) == b"end"
        finally:
            os.killpg(guest.pid, 9)
