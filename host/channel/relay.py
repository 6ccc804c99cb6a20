"""The launcher's side of the channel: one loop from the guest's start to its EXIT.

Carries streams, signals, terminal size and time limit, watches the heartbeat, and keeps the last
of the guest's console for the case that it fails.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from apppot.guest.protocol import frames
from apppot.host.channel.console import Console
from apppot.host.channel.outcome import GuestFailed, Outcome, checked_report
from apppot.host.channel.signals import ENDING, FORWARDED, OWN
from apppot.host.channel.streams import Sink, Source
from apppot.host.common import terminal
from apppot.host.common.errors import Aborted, UsageError
from apppot.host.common.units import parse_duration
from apppot.host.process.spawn import Child

if TYPE_CHECKING:
    import socket

    from apppot.host.channel.joined import Joined
    from apppot.host.channel.outputs import Returned

# Seconds without a word from the guest after which it is taken for hung.
HEARTBEAT_LIMIT = 30.0
HEARTBEAT_VARIABLE = "APPPOT_HEARTBEAT_LIMIT"
GRACE_SECONDS = 10.0
# After SIGKILL the payload is gone at once; a guest that does not say so is broken.
_KILL_SECONDS = 5.0
# A turn of the loop that took this much longer than asked means that the launcher was stopped.
_STOPPED_SECONDS = 3.0
# More than the time from one heartbeat to the next.
_SILENCE_SECONDS = 1.5
# Between the end of its channel and the end of its process.
_LAST_WORDS_SECONDS = 2.0

# What reading a frame raises that is none: RecursionError is JSON's answer to deep nesting.
_MALFORMED = (ValueError, KeyError, TypeError, OSError, struct.error, RecursionError)


def heartbeat_limit(env: Mapping[str, str] = os.environ) -> float:
    """Seconds without a heartbeat after which a guest is taken for hung.  Raises UsageError."""
    text = env.get(HEARTBEAT_VARIABLE)
    if not text:
        return HEARTBEAT_LIMIT
    try:
        return max(2.0, parse_duration(text))
    except UsageError as error:
        raise UsageError(f"${HEARTBEAT_VARIABLE}: {error.cause}", error.hint) from error


class Relay:
    """Runs one guest's channel.  `run` returns its Outcome or raises GuestFailed or Aborted."""

    def __init__(
        self,
        channel: int,
        vm: Child,
        console: Console,
        source: Source,
        sinks: tuple[Sink, Sink],
        *,
        tty: terminal.Terminal | None,
        hello_timeout: float,
        time_limit: float | None,
        helper: int | None,
        helper_prompt: bytes,
        vm_is_stopped: Callable[[], bool],
        machine_says: Callable[[], str],
        on_network_up: Callable[[], object],
        on_started: Callable[[], object] = bool,
        on_hello: Callable[[], object] | None = None,
        listener: socket.socket | None = None,
        join: Callable[[Relay], Joined] | None = None,
        take_files: Callable[[Relay], Returned] | None = None,
    ) -> None:
        self._channel, self._vm, self._console = channel, vm, console
        self._source, self._sinks, self._tty = source, sinks, tty
        self._helper, self._vm_is_stopped = helper, vm_is_stopped
        self._machine_says = machine_says
        self._on_network_up, self._on_started = on_network_up, on_started
        # Where no payload is to run: the guest is ended when it returns.
        self._on_hello = on_hello
        # Where others ask for processes beside the payload; loaded when the first one does.
        self._listener, self._join = listener, join
        self._joined: Joined | None = None
        # What the payload leaves, where its directory is not shared.
        self.returned = None if take_files is None else take_files(self)
        self._returning = False
        self._hello_timeout = hello_timeout
        self._time_limit = time_limit
        self._decoder = frames.Decoder(frames.GUEST_TYPES)
        self._out = bytearray()
        self._pending: list[int] = []
        self._gone = False
        self._helper_said = b""
        # What it prints when it is ready; nothing: it is.
        self._helper_prompt = helper_prompt
        self._started = False
        self._kill_at: float | None = None
        self._give_up_at: float | None = None
        self._limit_at: float | None = None
        self._heard = self._turned = time.monotonic()
        self._heartbeat_limit = heartbeat_limit()
        self.outcome = Outcome()
        os.set_blocking(channel, False)

    # -- life --------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Carry everything until the guest has said EXIT and its output is passed on."""
        wake, restore = self._catch_signals()
        try:
            while not self._finished():
                self._turn(wake)
            return self.outcome
        finally:
            restore()
            if self._joined is not None:
                self._joined.close()
            if self.returned is not None:
                self.returned.close()

    def _finished(self) -> bool:
        if not self.outcome.report or any(sink.fd() is not None for sink in self._sinks):
            return False
        return self._joined is None or self._joined.finished()

    def _catch_signals(self) -> tuple[int, Callable[[], None]]:
        read, write = os.pipe()
        os.set_blocking(read, False)
        os.set_blocking(write, False)
        old = {}
        for number in (*FORWARDED, *OWN):
            if signal.getsignal(number) is not signal.SIG_IGN or number in OWN:
                old[number] = signal.signal(number, lambda number, _: self._pending.append(number))
        old_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

        def restore() -> None:
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in old.items():
                signal.signal(number, handler)
            os.close(read)
            os.close(write)

        return read, restore

    def _turn(self, wake: int) -> None:
        poll = select.poll()
        poll.register(wake, select.POLLIN)
        if not self._gone:
            poll.register(self._channel, select.POLLIN | (select.POLLOUT if self._out else 0))
        if self._console.fd is not None:
            poll.register(self._console.fd, select.POLLIN)
        if self._helper is not None:
            poll.register(self._helper, select.POLLIN)
        source = self._source.fd() if self._started else None
        if source is not None:
            poll.register(source, select.POLLIN)
        for sink in self._sinks:
            if (fd := sink.fd()) is not None:
                poll.register(fd, select.POLLOUT)
        if self._listener is not None and self._started:
            poll.register(self._listener, select.POLLIN)
        if self._joined is not None:
            self._joined.register(poll)
        self._handle(dict(poll.poll(1000)), wake, source)
        self._forgive()
        if not self.outcome.report:
            self._watch()

    def _forgive(self) -> None:
        """Time in which the launcher itself was stopped does not count against the guest.

        Wherever in its turn that was: what counts is how long ago the last one ended.
        """
        now = time.monotonic()
        if now - self._turned > 1.0 + _STOPPED_SECONDS:
            self._heard = now
        self._turned = now

    def _handle(self, ready: dict[int, int], wake: int, source: int | None) -> None:
        if wake in ready:
            os.read(wake, 4096)
        while self._pending:
            self._signal(self._pending.pop(0))
        if self._console.fd in ready:
            self._console.pump()
        if self._helper is not None and self._helper in ready:
            self._hear_helper()
        if self._channel in ready:
            self._channel_ready(ready[self._channel])
        if source is not None and source in ready and self._source.fd() is not None:
            for frame in self._source.read():
                self.send(frame)
        for sink in self._sinks:
            if sink.fd() in ready:
                self._passed_on(sink, sink.flush())
        if self._listener is not None and self._listener.fileno() in ready:
            self._welcome()
        if self._joined is not None:
            self._joined.handle(ready)

    def _welcome(self) -> None:
        assert self._listener is not None
        if self._joined is None and self._join is not None:
            self._joined = self._join(self)
        if self._joined is not None:
            self._joined.accept(self._listener)

    # -- channel -----------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """Send a frame to the guest, as far as it still listens."""
        if self.outcome.report:
            return
        self._out += frame
        self._flush()

    def _flush(self) -> None:
        while self._out:
            try:
                del self._out[: os.write(self._channel, self._out)]
            except BlockingIOError:
                return
            except OSError:  # the guest is gone; reading says so
                self._out.clear()

    def _channel_ready(self, events: int) -> None:
        if events & select.POLLOUT:
            self._flush()
        if not events & ~select.POLLOUT:
            return
        try:
            data = os.read(self._channel, 1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone = True
            if not self.outcome.report:
                silent = not self.outcome.hello
                raise GuestFailed(f"the virtual machine {self._last_words()}", silent)
            return
        self._heard = time.monotonic()
        try:
            for frame in self._decoder.feed(data):
                self._frame(*frame)
        except _MALFORMED as error:
            raise GuestFailed(f"the guest broke the channel's protocol: {error}") from error

    def _frame(self, kind: int, stream: int, payload: bytes) -> None:
        if stream == frames.FILES:
            if self.returned is None:
                raise frames.FrameError("a file that nobody asked for")
            self.returned.frame(kind, payload)
        elif stream >= frames.STREAMS:
            if self._joined is None:
                raise frames.FrameError(f"stream {stream} of a process that nobody started")
            self._joined.frame(kind, stream, payload)
        elif kind == frames.DATA:
            sink = self._sink(stream)
            self._passed_on(sink, sink.add(payload))
        elif kind == frames.HEARTBEAT:
            self.outcome.vital_signs = json.loads(payload)
        elif kind == frames.CREDIT:
            self._source.credit(frames.U32.unpack(payload)[0])
        elif kind == frames.CHUNK_DONE:
            self._source.chunk_done(payload.decode("ascii"))
        elif kind == frames.CLOSED:
            self._source.stop()
        elif kind == frames.HELLO:
            self._hello(json.loads(payload))
        elif kind == frames.STOPPED:
            self._stopped()
        elif kind == frames.NETWORK_UP:
            self._on_network_up()
            self.send(frames.encode(frames.GO, payload=b'{"version": %d}' % frames.VERSION))
        elif kind == frames.STARTED:
            self._mark("payload")
            self._started = True
            # Not from GO: the files of the job directory may have to come first.
            if self._time_limit is not None:
                self._limit_at = time.monotonic() + self._time_limit
            self._on_started()
        elif kind == frames.RETURNING:
            if self.returned is None:
                raise frames.FrameError("a guest returns what nobody asked for")
            # The payload has ended: its time limit does not count any more.
            self._mark("payload ended")
            self._returning = True
            self._limit_at = self._kill_at = self._give_up_at = None
        elif kind == frames.EXIT:
            self._mark("exit")
            report = checked_report(json.loads(payload))
            if self.returned is not None:
                self.returned.finish(report.get("outputs"))
            self.send(frames.encode(frames.BYE))
            self.outcome.report = report
        elif kind == frames.FAILED:
            failure = json.loads(payload)
            raise GuestFailed(f"step {failure['step']!r} failed in the guest: {failure['reason']}")

    def _sink(self, stream: int) -> Sink:
        if stream not in (frames.STDOUT, frames.STDERR):
            raise frames.FrameError(f"data on stream {stream}")
        return self._sinks[stream - frames.STDOUT]

    def _passed_on(self, sink: Sink, count: int) -> None:
        if sink.closed:
            self.send(frames.encode(frames.CLOSED, sink.stream))
        elif credit := sink.credit(count):
            self.send(frames.encode(frames.CREDIT, sink.stream, frames.U32.pack(credit)))

    def _mark(self, what: str) -> None:
        self.outcome.marks.append((what, time.monotonic()))

    def _hello(self, hello: dict[str, Any]) -> None:
        if hello["version"] != frames.VERSION:
            raise GuestFailed(
                f"the runtime speaks protocol {hello['version']}, this launcher {frames.VERSION}"
            )
        self._mark("hello")
        self.outcome.hello = hello
        if self._on_hello is not None:
            self._on_hello()
            self.outcome.report = {"status": 0}
        elif not self._helper_prompt:
            self._go()

    def _hear_helper(self) -> None:
        """The network helper has said something, perhaps that it is ready, or is gone."""
        assert self._helper is not None
        said = os.read(self._helper, 4096)
        self._helper_said = (self._helper_said + said)[-4096:]
        if not said:
            os.close(self._helper)
            self._helper = None
            self._helper_lost()
        elif self._helper_prompt and self._helper_prompt in self._helper_said:
            self._helper_prompt = b""
            if self.outcome.hello:
                self._go()

    def _helper_lost(self) -> None:
        last = self._helper_said.decode(errors="replace").strip().splitlines()[-1:]
        reason = f"the network helper ended: {last[0] if last else 'it said nothing'}"
        if self._helper_prompt:
            raise GuestFailed(reason)
        sys.stderr.write(f"apppot: warning: {reason}\n")

    def _go(self) -> None:
        self._mark("go")
        said = json.dumps({"version": frames.VERSION, "time": time.time()})
        self.send(frames.encode(frames.GO, payload=said.encode()))

    # -- signals and time --------------------------------------------------------------------

    def _signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif number == signal.SIGTSTP:
            self._stop()
        elif number == signal.SIGCONT:
            # The shell has the terminal as it likes it while we are stopped.
            if self._tty is not None:
                self._tty.raw()
                self._resize()
            self._heard = time.monotonic()
            self._payload_signal(signal.SIGCONT)
        elif not self._started or (self._returning and number in ENDING):
            raise Aborted(number)
        else:
            self._payload_signal(number)

    def _payload_signal(self, number: int) -> None:
        self.send(frames.encode(frames.SIGNAL, payload=frames.U32.pack(number)))

    def _resize(self) -> None:
        if self._tty is not None:
            rows, columns = terminal.size(self._tty.fd)
            self.send(frames.encode(frames.RESIZE, payload=frames.SIZE.pack(rows, columns)))

    def _stop(self) -> None:
        """SIGTSTP: stop the payload, then the launcher; `fg` continues both."""
        if self._tty is not None:
            # It may have other plans for this signal; when it stops, the guest says so.
            self._payload_signal(signal.SIGTSTP)
            return
        # SIGTSTP would be ignored: the payload leads a session that nobody in the guest watches.
        self._payload_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)

    def _stopped(self) -> None:
        """Ctrl-Z on a terminal has stopped the payload: the launcher follows."""
        if self._tty is not None:
            self._tty.restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _watch(self) -> None:
        """What is due by time: HELLO, heartbeat, time limit."""
        now = time.monotonic()
        limit = self._heartbeat_limit if self.outcome.hello else self._hello_timeout
        # Asked at each turn of a silence, so that one who has just been continued has the whole
        # limit to speak again.
        if now - self._heard > _SILENCE_SECONDS and self._vm_is_stopped():
            self._heard = now
        if now - self._heard > limit:
            what = "sent no heartbeat" if self.outcome.hello else "did not say HELLO"
            silent = not self.outcome.hello
            raise GuestFailed(f"the guest {what} for {limit:.0f} s: it hangs{self._why()}", silent)
        self._time_is_up(now)

    def stop(self, grace: float) -> None:
        """End the payload: SIGTERM now, after `grace` seconds SIGKILL."""
        if self._returning:
            self._pending.append(signal.SIGTERM)
            return
        self._payload_signal(signal.SIGTERM)
        self._payload_signal(signal.SIGCONT)
        self._kill_at = time.monotonic() + grace

    def _last_words(self) -> str:
        """How the virtual machine ended; takes the rest of its console."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while not self._vm.ended() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._console.pump()
        return f"{self._vm.how()} and reported no status of the payload{self._why()}"

    def _why(self) -> str:
        """What the hypervisor itself knows of the end, as the rest of a sentence."""
        said = self._machine_says()
        return f"; {said}" if said else ""

    def _time_is_up(self, now: float) -> None:
        if self._limit_at is not None and now >= self._limit_at:
            self._limit_at = None
            self.outcome.timed_out = True
            self._kill_at = now + GRACE_SECONDS
            self._payload_signal(signal.SIGTERM)
            self._payload_signal(signal.SIGCONT)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._give_up_at = now + _KILL_SECONDS
            self._payload_signal(signal.SIGKILL)
        if self._give_up_at is not None and now >= self._give_up_at:
            raise GuestFailed("the payload could not be ended")
