"""One process in the guest, on the host's side: its three streams, under credit.

Process 0 is the payload; those that join it have numbers from 1 on.
"""

from __future__ import annotations

import select
from collections.abc import Callable

from apppot.guest.protocol import frames
from apppot.host.channel.streams import Sink, Source


class ProcessStreams:
    """Carries one process's stdin, stdout and stderr; `send` takes frames for the guest.

    Input flows once `started` is set: until then nobody in the guest would read it.
    """

    def __init__(
        self, source: Source, sinks: tuple[Sink, Sink], send: Callable[[bytes], object]
    ) -> None:
        self._source, self._sinks, self._send = source, sinks, send
        self.started = False
        self._closed = False

    def register(self, poll: select.poll) -> None:
        """Add what is waited for."""
        for sink in self._sinks:
            if (fd := sink.fd()) is not None:
                poll.register(fd, select.POLLOUT)
        if self.started and (fd := self._source.fd()) is not None:
            poll.register(fd, select.POLLIN)

    def handle(self, ready: dict[int, int]) -> None:
        """Act on what `poll` said."""
        if self.started and self._source.fd() in ready:
            for frame in self._source.read():
                self._send(frame)
        for sink in self._sinks:
            if sink.fd() in ready:
                self._passed_on(sink, sink.flush())

    def frame(self, kind: int, stream: int, payload: bytes) -> bool:
        """Take a frame of its streams; False for one that is about something else.

        Raises FrameError, or what `struct` and the like raise of a payload that is none.
        """
        if kind == frames.DATA:
            sink = self._sink(stream)
            self._passed_on(sink, sink.add(payload))
        elif kind == frames.CREDIT:
            self._source.credit(frames.U32.unpack(payload)[0])
        elif kind == frames.CHUNK_DONE:
            if not self._closed:  # else it is removed already
                self._source.chunk_done(payload.decode("ascii"))
        elif kind == frames.CLOSED:
            self._source.stop()
        else:
            return False
        return True

    def flowing(self) -> bool:
        """Whether something that it wrote is still to be passed on."""
        return any(sink.fd() is not None for sink in self._sinks)

    def ended(self) -> None:
        """It takes no more input; what it did not take is removed."""
        self._source.forget()

    def close(self) -> None:
        """Pass on nothing any more, in either direction."""
        self._closed = True
        self._source.forget()
        for sink in self._sinks:
            sink.close()

    def _sink(self, stream: int) -> Sink:
        for sink in self._sinks:
            if sink.stream == stream:
                return sink
        raise frames.FrameError(f"data on stream {stream}")

    def _passed_on(self, sink: Sink, count: int) -> None:
        if sink.closed:
            self._send(frames.encode(frames.CLOSED, sink.stream))
        elif credit := sink.credit(count):
            self._send(frames.encode(frames.CREDIT, sink.stream, frames.U32.pack(credit)))
