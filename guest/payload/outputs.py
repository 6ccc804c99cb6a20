"""What a job leaves goes back to the launcher: files at the end, followed files while they grow.

Off the boot path of a guest from which nothing comes back.  One sequence of frames, made as far
as the launcher gives credit.  What cannot be read is told in the report and does not stop the rest.
"""

from __future__ import annotations

import os
import stat
import time

from apppot.guest import tools
from apppot.guest.merge.root import ROOT
from apppot.guest.payload import matches
from apppot.guest.payload.followed import Followed
from apppot.guest.payload.inputs import PLACE
from apppot.guest.payload.pieces import PIECE_BYTES, Root, describe, encoded, in_pieces
from apppot.guest.protocol import frames, globs
from apppot.guest.protocol.jsonlite import dumps

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from apppot.guest.payload.channel import Channel
    from apppot.guest.payload.pieces import Frame
    from apppot.guest.protocol.job import Job

_MANY = 1024  # files
_BACKLOG_BYTES = 128 << 10
# Of a report, which is one frame.
_MOST_TOLD, _TOLD_BYTES = 20, 500
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}
_COARSE_CLOCK = 6  # CLOCK_MONOTONIC_COARSE
_PYTHON = "/usr/bin/python3"
_WATCH = "import sys; sys.path[:0] = ['/usr/lib/apppot']; from apppot.guest.payload import watch; "


class Files:
    """Everything that one job returns.  Make it when the payload's files are there, before it runs.

    `fd` says when a followed file may have changed; `beat` is called in long work.
    """

    def __init__(self, job: Job, beat: Callable[[], object]) -> None:
        self.credit = frames.FILES_CREDIT
        self.fd: int | None = None
        self.done = False
        self._copy, self._patterns = job.job_copy, job.outputs
        self._root = Root(ROOT, beat)
        self._work: Iterator[Frame] | None = None
        self._changed = self._leaving = self._last = False
        self._names: dict[bytes, bytes] = {}  # on the host -> in the guest
        self._sent = self._bytes = self._left_out = 0
        self._failed: list[list[str]] = []
        self._unmatched: list[bytes] = []
        self._known: set[int] = set()
        if self._copy:
            self._known = {_mark(path, found) for path, found in self._walk(PLACE.encode(), b"")}
            _await_tick()
        self._followed = [Followed(self._root, path) for path in job.follow]

    def watch(self) -> None:
        """Have a process of the pot's watch the followed files; call it when the payload runs."""
        if not self._followed:
            return
        self.fd, theirs = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(theirs, False)
        words = [_PYTHON, "-IS", "-c", _WATCH + "watch.main()", ROOT]
        tools.start([*words, *[os.fsdecode(one.place) for one in self._followed]], theirs)
        os.close(theirs)

    # -- the agent's loop --------------------------------------------------------------------

    def notice(self) -> None:
        """The watching process has said something, or is gone."""
        if self.fd is None:
            return
        if os.read(self.fd, 4096):
            self._changed = True
            return
        os.close(self.fd)
        self.fd = None

    def leave(self) -> None:
        """The payload has ended: return all that is to be returned, then be `done`."""
        self._leaving = True

    def busy(self) -> bool:
        """Whether frames can be sent now."""
        waiting = self._work is not None or self._changed or self._leaving
        return waiting and not self.done and self.credit > frames.MAX_PAYLOAD

    def pump(self, channel: Channel) -> None:
        """Send what credit and channel allow without waiting."""
        while self.busy() and channel.backlog() < _BACKLOG_BYTES:
            if self._work is None:
                self._work = self._next_work()
            frame = next(self._work, None)
            if frame is None:
                self._work = None
                self.done = self._last
                break
            kind, payload = frame
            self.credit -= len(payload)
            channel.queue(kind, frames.FILES, payload)
            if channel.backlog() > PIECE_BYTES:
                channel.flush()
        channel.flush()

    def _next_work(self) -> Iterator[Frame]:
        self._changed, self._last = False, self._leaving
        return self._all() if self._leaving else self._updates()

    def report(self) -> dict[str, Any]:
        """What EXIT says of it."""
        return {
            "files": self._sent,
            "bytes": self._bytes,
            "left_out": self._left_out,
            "failed": self._failed,
            "unmatched": [encoded(p[:_TOLD_BYTES]) for p in self._unmatched[:_MOST_TOLD]],
        }

    def failed(self, path: bytes, reason: str) -> None:
        """Say in the report that `path` does not come back."""
        if len(self._failed) < _MOST_TOLD:
            self._failed.append([encoded(path[:_TOLD_BYTES]), reason[:_TOLD_BYTES]])

    # -- followed files ----------------------------------------------------------------------

    def _updates(self) -> Iterator[Frame]:
        for one in self._followed:
            yield from one.updates()

    # -- the end -----------------------------------------------------------------------------

    def _all(self) -> Iterator[Frame]:
        for one in self._followed:
            yield from one.rest()
            if one.began:
                self._names[one.name] = one.place
            else:
                self._unmatched.append(one.name)
        everything = [b""] if self._copy else []
        for pattern in self._patterns or everything:
            try:
                yield from self._matching(pattern)
            except OSError as error:
                self.failed(pattern, f"{error}")

    def _matching(self, pattern: bytes) -> Iterator[Frame]:
        """The frames of what `pattern` matches; an empty one, of all that is new in a copy."""
        if not pattern:
            yield from self._tree(PLACE.encode(), b"", b"")
            return
        matched, place = False, PLACE.encode()
        for root, path, name in matches.find(self._root.fd, place, pattern):
            matched = True
            if root == place:
                yield from self._parents(root, path)
            yield from self._tree(root, path, name)
        if not matched:
            self._unmatched.append(pattern)

    def _parents(self, root: bytes, path: bytes) -> Iterator[Frame]:
        parts = path.split(b"/")
        for depth in range(1, len(parts)):
            parent = b"/".join(parts[:depth])
            source = os.path.join(root, parent)
            found = os.lstat(source)
            if parent not in self._names and _mark(parent, found) not in self._known:
                yield from self._entry(source, parent, found)

    def _tree(self, root: bytes, top: bytes, name: bytes) -> Iterator[Frame]:
        """`top` below `root` and all in it, as `name` on the host; of a copy what has changed."""
        inside = root == PLACE.encode()
        for path, found in self._walk(root, top):
            target, source = name + path[len(top) :], os.path.join(root, path)
            if inside and _mark(path, found) in self._known:
                continue
            if target not in self._names:
                yield from self._entry(source, target, found)
            elif not inside and not matches.same(self._names[target], source):
                self.failed(path, f"{os.fsdecode(target)} comes back from elsewhere already")

    def _walk(self, root: bytes, top: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
        for number, found in enumerate(globs.walk(root, top)):
            if number % _MANY == 0:
                self._root.beat()
            yield found

    def _entry(self, source: bytes, name: bytes, found: os.stat_result) -> Iterator[Frame]:
        """The frames of one file, directory or symbolic link."""
        self._names[name] = source
        kind = _KINDS.get(stat.S_IFMT(found.st_mode))
        if kind is None:
            self._left_out += 1
            return
        head = describe(self._root.next_number(), kind, name, found)
        try:
            if kind == "file":
                yield from self._file(source, head)
                return
            if kind == "link":
                head["target"] = encoded(os.readlink(source))
            yield frames.FILE, dumps(head).encode()
            self._sent += 1
        except OSError as error:
            self.failed(name, error.strerror or f"{error}")

    def _file(self, source: bytes, head: dict[str, Any]) -> Iterator[Frame]:
        fd = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        end: dict[str, Any] = {"id": head["id"]}
        try:
            yield frames.FILE, dumps(head).encode()
            try:
                for offset, data in in_pieces(fd, head["size"]):
                    yield frames.FILE_DATA, frames.PIECE.pack(head["id"], offset) + data
                    self._bytes += len(data)
                self._sent += 1
            except OSError as error:
                end["failed"] = error.strerror or f"{error}"
        finally:
            os.close(fd)
        yield frames.FILE_END, dumps(end).encode()


def _mark(path: bytes, found: os.stat_result) -> int:
    """What tells a file as it was unpacked from one that was made, changed or moved since."""
    return hash((path, found.st_ino, found.st_ctime_ns))


def _await_tick() -> None:
    """Wait until the clock of change times has moved on: what is written now will differ."""
    begun = time.clock_gettime_ns(_COARSE_CLOCK)
    while time.clock_gettime_ns(_COARSE_CLOCK) == begun:
        time.sleep(0.001)
