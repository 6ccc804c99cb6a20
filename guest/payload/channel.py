"""The guest's end of the channel."""

from __future__ import annotations

import os
import select
import termios

from apppot.guest import syscalls
from apppot.guest.protocol import frames

# A virtual port appears a moment after PID 1 has started.
_DEVICE_SECONDS = 5.0
HANGUP = select.POLLHUP | select.POLLERR | select.POLLNVAL


class ChannelLost(Exception):
    """The launcher is gone; nobody waits for this guest any more."""


def open_channel(device: str) -> int:
    """Open the channel's serial line or port and make it carry bytes as they are."""
    syscalls.wait_for_path(device, _DEVICE_SECONDS)
    fd = os.open(device, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    if os.isatty(fd):
        attributes = termios.tcgetattr(fd)
        attributes[0] = attributes[1] = attributes[3] = 0
        attributes[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
        attributes[6][termios.VMIN] = 1
        attributes[6][termios.VTIME] = 0
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
    return fd


class Channel:
    """Frames over a non-blocking descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._out = bytearray()
        self._decoder = frames.Decoder(frames.HOST_TYPES)

    def send(self, kind: int, stream: int = frames.CONTROL, payload: bytes = b"") -> None:
        """Queue a frame and pass on what the channel takes at once."""
        self.queue(kind, stream, payload)
        self.flush()

    def greet(self, payload: bytes) -> None:
        """Send HELLO, waiting for the launcher: before it has a port open, the port seems lost."""
        os.set_blocking(self.fd, True)
        self.send(frames.HELLO, payload=payload)
        os.set_blocking(self.fd, False)

    def queue(self, kind: int, stream: int, payload: bytes) -> None:
        """Have a frame go out with the next flush: many small ones are one write."""
        self._out += frames.encode(kind, stream, payload)

    def wait(self) -> list[tuple[int, int, bytes]]:
        """The frames that come in next, however long that takes, and without a sign of life.

        Raises ChannelLost at the end of the channel.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.poll()
        return self.receive()

    def backlog(self) -> int:
        """Bytes that the channel has not taken yet."""
        return len(self._out)

    def flush(self) -> None:
        """Write what the channel takes without waiting."""
        while self._out:
            try:
                count = os.write(self.fd, self._out)
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelLost(str(error)) from error
            if count == 0:
                return
            del self._out[:count]

    def receive(self) -> list[tuple[int, int, bytes]]:
        """The frames that have come in.  Raises ChannelLost at the end of the channel."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelLost(str(error)) from error
        if not data:
            raise ChannelLost("end of file")
        return self._decoder.feed(data)

    def part(self) -> None:
        """Wait until the launcher has read all, as its BYE says.  Raises ChannelLost if it is gone.

        What a serial line or a port has taken, and the host has not, goes with the machine: a
        launcher that is slow, or stopped, would never hear of the payload's end.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while self._out:
            poll.poll(1000)
            self.flush()
        while all(kind != frames.BYE for kind, _, _ in self.wait()):
            pass
