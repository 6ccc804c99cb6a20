"""The channel's frames: type, stream, length, payload.

A frame is an 6-byte header (type: u8, stream: u8, length: u32, little endian) and `length`
bytes.  Data flows under credit: a sender may have at most its stream's credit of bytes under
way, the receiver gives credit back as it passes bytes on.  So a reader that stands still stops
one stream, never the control frames.  Peers say their version in HELLO and GO.

One guest may run several processes: 0 is the payload, the others joined it (EXEC).  The stream
byte holds both, `STREAMS * process + stream`; EXIT, FAILED, STARTED, SIGNAL and RESIZE have the
process's CONTROL stream.  Files that come back have a stream of their own (FILES).
"""

from __future__ import annotations

import struct

VERSION = 1

HEADER = struct.Struct("<BBI")
MAX_PAYLOAD = 1 << 16

# Bytes that may be under way.  Output runs at memory speed; a serial line takes input at
# 2 MB/s, so that its window also bounds how long a control frame waits behind data.
OUTPUT_CREDIT = 1 << 20
# Less than the 4096 bytes that a terminal line of the guest buffers: when that runs full under
# load, User-Mode Linux may never read its serial line again (seen on 6.1 and 7.2).
INPUT_CREDIT = 3 << 10
# A virtual port has no such buffer.
PORT_CREDIT = 3 * MAX_PAYLOAD
FILES_CREDIT = 1 << 20

# Streams.
CONTROL, STDIN, STDOUT, STDERR = 0, 1, 2, 3
STREAMS = 4
PROCESSES = 32
FILES = STREAMS * PROCESSES

# Guest to host.
HELLO = 1  # JSON: version, timeline, what the guest is
HEARTBEAT = 2  # JSON: memory, load, CPU time
EXIT = 3  # JSON: wait status or why the payload could not start; nothing follows
FAILED = 4  # JSON: step and reason; the guest could not do its part, no payload ran on
STARTED = 5  # JSON: the payload's first instruction is next
STOPPED = 7  # JSON: the payload of a terminal has stopped, as by Ctrl-Z
NETWORK_UP = 6  # JSON: the interface is up; the guest waits for one more GO
RETURNING = 8  # JSON: the payload has ended, what it leaves follows, then EXIT
# On the stream FILES.
FILE = 9  # JSON: id, kind, path, attributes of what follows, or of what needs no more
FILE_DATA = 10  # u32 id, u64 offset, bytes; what no such frame writes is a hole
FILE_END = 11  # JSON: id; it is complete, or why it could not be read
# Host to guest.
GO = 16  # JSON: version, and the time (seconds since 1970); start the payload
SIGNAL = 17  # u32: signal number for the payload's process group
RESIZE = 18  # u16 rows, u16 columns
INPUT_FILE = 19  # JSON: name of a chunk of stdin in the exchange directory
EXEC = 20  # JSON: name of the file in the exchange directory that describes one more process;
# without one, the bytes that came before it do
EXEC_PART = 21  # a piece of such a description
BYE = 22  # EXIT has been read; the machine may go off
WAKE = 30  # JSON: entropy; a machine that was kept goes on with the job that came in pieces
WAKE_PART = 31  # a piece of its description
# Either way.
DATA = 32  # bytes of a stream
CREDIT = 33  # u32: bytes of a stream that were passed on
END = 34  # the stream has ended at its source
CLOSED = 35  # nobody reads the stream any more
CHUNK_DONE = 36  # a chunk file of stdin was read to its end

GUEST_TYPES = frozenset(
    (
        HELLO,
        HEARTBEAT,
        EXIT,
        FAILED,
        STARTED,
        STOPPED,
        NETWORK_UP,
        RETURNING,
        FILE,
        FILE_DATA,
        FILE_END,
        DATA,
        CREDIT,
        END,
        CLOSED,
        CHUNK_DONE,
    )
)
HOST_TYPES = frozenset(
    (
        GO,
        SIGNAL,
        RESIZE,
        INPUT_FILE,
        EXEC,
        EXEC_PART,
        BYE,
        WAKE,
        WAKE_PART,
        DATA,
        CREDIT,
        END,
        CLOSED,
    )
)

LIMIT = FILES + 1  # of the stream byte

U32 = struct.Struct("<I")
SIZE = struct.Struct("<HH")
PIECE = struct.Struct("<IQ")


class FrameError(ValueError):
    """The peer sent what is not a frame of this protocol."""


def encode(kind: int, stream: int = CONTROL, payload: bytes = b"") -> bytes:
    """One frame as bytes.  Raises FrameError when the payload is too large."""
    if len(payload) > MAX_PAYLOAD:
        raise FrameError(f"payload of {len(payload)} bytes exceeds {MAX_PAYLOAD}")
    return HEADER.pack(kind, stream, len(payload)) + payload


class Decoder:
    """Turns the bytes of a channel into frames, whatever pieces they come in."""

    def __init__(self, allowed: frozenset[int]) -> None:
        self._allowed = allowed
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Take bytes in, return the (type, stream, payload) that are complete by now.

        Raises FrameError on an unknown type or stream, or a length over MAX_PAYLOAD; the
        channel cannot be trusted after that.
        """
        buffer = self._buffer
        buffer += data
        frames: list[tuple[int, int, bytes]] = []
        offset = 0
        while len(buffer) - offset >= HEADER.size:
            kind, stream, length = HEADER.unpack_from(buffer, offset)
            if kind not in self._allowed or stream >= LIMIT or length > MAX_PAYLOAD:
                raise FrameError(f"bad frame: type {kind}, stream {stream}, length {length}")
            end = offset + HEADER.size + length
            if len(buffer) < end:
                break
            frames.append((kind, stream, bytes(buffer[offset + HEADER.size : end])))
            offset = end
        if offset:
            del buffer[:offset]
        return frames

    def pending(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)
