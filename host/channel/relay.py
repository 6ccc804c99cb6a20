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
from apppot.host.channel.process import ProcessStreams
from apppot.host.channel.signals import ENDING, CaughtSignals, JobControl
from apppot.host.channel.streams import Sink, Source
from apppot.host.common import terminal
from apppot.host.common.errors import Aborted, UsageError
from apppot.host.common.frozen import frozen
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

_SAID_IN_JSON = (frames.HELLO, frames.HEARTBEAT, frames.EXIT, frames.FAILED)
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


@frozen
class RunningMachine:
    """The hypervisor's process, as the relay sees it; `channel` is our end of the guest's channel.

    `is_stopped`: whether somebody has stopped it; `says`: its own word on its end, or nothing.
    """

    channel: int
    process: Child
    console: Console
    is_stopped: Callable[[], bool]
    says: Callable[[], str]


@frozen
class Ends:
    """The launcher's ends of the payload's streams, and its terminal where it shows one."""

    source: Source
    sinks: tuple[Sink, Sink]
    tty: terminal.Terminal | None = None


@frozen
class Limits:
    """Seconds: until the guest says HELLO, and for the payload (None: no limit)."""

    hello: float
    payload: float | None = None


@frozen
class HelperOutput:
    """What the network helper prints: `prompt` once it is ready; no prompt: it is."""

    fd: int | None = None
    prompt: bytes = b""


@frozen
class Hooks:
    """What the launcher does when its guest gets there.

    With `hello` no payload is to run: the guest is ended when it returns.  `listener` is where
    others ask for processes beside the payload; `join`, called when the first does, takes them.
    `take_files` is called where files of the payload come back.
    """

    network_up: Callable[[], object] = bool
    started: Callable[[], object] = bool
    hello: Callable[[], object] | None = None
    listener: socket.socket | None = None
    join: Callable[[Relay], Joined] | None = None
    take_files: Callable[[Relay], Returned] | None = None


class Relay:
    """Runs one guest's channel.  `run` returns its Outcome or raises GuestFailed or Aborted."""

    def __init__(
        self,
        machine: RunningMachine,
        ends: Ends,
        limits: Limits,
        helper: HelperOutput,
        hooks: Hooks,
    ) -> None:
        self._machine, self._limits, self._hooks = machine, limits, hooks
        self._channel, self._console = machine.channel, machine.console
        self._streams = ProcessStreams(ends.source, ends.sinks, self.send)
        self._control = JobControl(ends.tty, self._payload_signal, self._payload_size)
        self._signals = CaughtSignals()
        self._joined: Joined | None = None
        self.outcome = Outcome()
        # What the payload leaves, where its directory is not shared.
        self.returned = None if hooks.take_files is None else hooks.take_files(self)
        self._went = False  # GO was said
        self._returning = False
        self._decoder = frames.Decoder(frames.GUEST_TYPES)
        self._out = bytearray()
        self._gone = False
        self._helper, self._helper_prompt, self._helper_said = helper.fd, helper.prompt, b""
        self._kill_at: float | None = None
        self._give_up_at: float | None = None
        self._limit_at: float | None = None
        self._heard = self._turned = time.monotonic()
        self._heartbeat_limit = heartbeat_limit()
        os.set_blocking(machine.channel, False)

    # -- life --------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Carry everything until the guest has said EXIT and its output is passed on."""
        try:
            with self._signals:
                while not self._finished():
                    self._turn()
                if self._went:
                    self._signals.settle()
            return self.outcome
        finally:
            if self._joined is not None:
                self._joined.close()
            if self.returned is not None:
                self.returned.close()

    def _finished(self) -> bool:
        if not self.outcome.report or self._streams.flowing():
            return False
        return self._joined is None or self._joined.finished()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._signals.fd, select.POLLIN)
        if not self._gone:
            poll.register(self._channel, select.POLLIN | (select.POLLOUT if self._out else 0))
        if self._console.fd is not None:
            poll.register(self._console.fd, select.POLLIN)
        if self._helper is not None:
            poll.register(self._helper, select.POLLIN)
        self._streams.register(poll)
        if self._hooks.listener is not None and self._streams.started:
            poll.register(self._hooks.listener, select.POLLIN)
        if self._joined is not None:
            self._joined.register(poll)
        self._handle(dict(poll.poll(1000)))
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

    def _handle(self, ready: dict[int, int]) -> None:
        for number in self._signals.take(ready):
            self._signal(number)
        if self._console.fd in ready:
            self._console.pump()
        if self._helper is not None and self._helper in ready:
            self._hear_helper()
        # Before the channel, which may let a stream flow that was not waited for.
        self._streams.handle(ready)
        if self._channel in ready:
            self._channel_ready(ready[self._channel])
        listener = self._hooks.listener
        if listener is not None and listener.fileno() in ready:
            self._welcome(listener)
        if self._joined is not None:
            self._joined.handle(ready)

    def _welcome(self, listener: socket.socket) -> None:
        if self._joined is None and self._hooks.join is not None:
            self._joined = self._hooks.join(self)
        if self._joined is not None:
            self._joined.accept(listener)

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
        elif not self._streams.frame(kind, stream, payload):
            said = json.loads(payload) if kind in _SAID_IN_JSON else None
            self._said(kind, said)

    def _said(self, kind: int, said: Any) -> None:
        """A frame about the guest or its payload; `said` is its JSON, where it has some."""
        match kind:
            case frames.HELLO:
                self._hello(said)
            case frames.HEARTBEAT:
                self.outcome.vital_signs = said
            case frames.NETWORK_UP:
                self._hooks.network_up()
                self.send(frames.encode(frames.GO, payload=b'{"version": %d}' % frames.VERSION))
            case frames.STARTED:
                self._payload_started()
            case frames.STOPPED:
                self._control.stopped()
            case frames.RETURNING:
                self._payload_ended()
            case frames.EXIT:
                self._exit(checked_report(said))
            case frames.FAILED:
                reason = f"step {said['step']!r} failed in the guest: {said['reason']}"
                raise GuestFailed(reason)

    def _payload_started(self) -> None:
        self._mark("payload")
        self._streams.started = True
        # Not from GO: the files of the job directory may have to come first.
        if self._limits.payload is not None:
            self._limit_at = time.monotonic() + self._limits.payload
        self._hooks.started()

    def _payload_ended(self) -> None:
        """What it left comes back now: its time limit does not count any more."""
        if self.returned is None:
            raise frames.FrameError("a guest returns what nobody asked for")
        self._mark("payload ended")
        self._returning = True
        self._limit_at = self._kill_at = self._give_up_at = None

    def _exit(self, report: dict[str, Any]) -> None:
        self._mark("exit")
        if self.returned is not None:
            self.returned.finish(report.get("outputs"))
        self.send(frames.encode(frames.BYE))
        self.outcome.report = report

    def _mark(self, what: str) -> None:
        self.outcome.marks.append((what, time.monotonic()))

    def _hello(self, hello: dict[str, Any]) -> None:
        if hello["version"] != frames.VERSION:
            raise GuestFailed(
                f"the runtime speaks protocol {hello['version']}, this launcher {frames.VERSION}"
            )
        self._mark("hello")
        self.outcome.hello = hello
        if self._hooks.hello is not None:
            self._hooks.hello()
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
        self._went = True
        said = json.dumps({"version": frames.VERSION, "time": time.time()})
        self.send(frames.encode(frames.GO, payload=said.encode()))

    # -- signals and time --------------------------------------------------------------------

    def _signal(self, number: int) -> None:
        if number == signal.SIGCONT:
            self._heard = time.monotonic()
        if self._control.take(number):
            return
        # From GO on a signal is the payload's, though nobody here may have heard of its start yet.
        if not self._went or (self._returning and number in ENDING):
            raise Aborted(number)
        self._payload_signal(number)

    def _payload_signal(self, number: int) -> None:
        self.send(frames.encode(frames.SIGNAL, payload=frames.U32.pack(number)))

    def _payload_size(self, rows: int, columns: int) -> None:
        self.send(frames.encode(frames.RESIZE, payload=frames.SIZE.pack(rows, columns)))

    def _watch(self) -> None:
        """What is due by time: HELLO, heartbeat, time limit."""
        now = time.monotonic()
        limit = self._heartbeat_limit if self.outcome.hello else self._limits.hello
        # Asked at each turn of a silence, so that one who has just been continued has the whole
        # limit to speak again.
        if now - self._heard > _SILENCE_SECONDS and self._machine.is_stopped():
            self._heard = now
        if now - self._heard > limit:
            what = "sent no heartbeat" if self.outcome.hello else "did not say HELLO"
            silent = not self.outcome.hello
            raise GuestFailed(f"the guest {what} for {limit:.0f} s: it hangs{self._why()}", silent)
        self._time_is_up(now)

    def stop(self, grace: float) -> None:
        """End the payload: SIGTERM now, after `grace` seconds SIGKILL."""
        if self._returning:
            self._signals.add(signal.SIGTERM)
            return
        self._payload_signal(signal.SIGTERM)
        self._payload_signal(signal.SIGCONT)
        self._kill_at = time.monotonic() + grace

    def _last_words(self) -> str:
        """How the virtual machine ended; takes the rest of its console."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while not self._machine.process.ended() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._console.pump()
        return f"{self._machine.process.how()} and reported no status of the payload{self._why()}"

    def _why(self) -> str:
        """What the hypervisor itself knows of the end, as the rest of a sentence."""
        said = self._machine.says()
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
