"""Files that come back from a guest: the launcher's side.

A guest is not trusted.  What it sends names a place below one directory of this host, which is
reached component by component without following a symbolic link; a file appears under its name
when it is complete, or not at all.  Only followed files grow under their names.  What breaks the
protocol ends that guest (FrameError); what this host refuses (a full disk, a directory in the way)
is kept in `failures`, and the rest goes on.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Callable
from typing import Any

from apppot.guest.protocol import frames
from apppot.host.common.errors import ApppotError
from apppot.host.common.files import pwrite_all
from apppot.host.common.frozen import frozen
from apppot.host.common.text import printable

_MOST_OPEN = 64
_MOST_ENTRIES = 1 << 22
_MOST_FAILURES = 20
_PATH_BYTES, _NAME_BYTES = 4095, 255
_BIGGEST = 1 << 62
# Nanoseconds since 1970 that every file system's calls take: 1833 to 2242.
_TIME_LIMIT = 1 << 32
_CREDIT_BYTES = frames.FILES_CREDIT // 8
# Neither setuid nor setgid: who made a file in a guest must not lend the caller's rights.
_MODE = 0o777
_DIRECTORY_MODE = 0o1777
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Parts = tuple[bytes, ...]


class OutputError(ApppotError):
    """Not all of what the job left could be brought back."""


@frozen
class Entry:
    """One FILE frame, checked."""

    number: int
    kind: str
    parts: Parts
    mode: int
    mtime: int
    size: int  # of a followed file: what this host has of it already
    target: bytes


def checked_path(text: Any) -> Parts:
    """The components of a path that a guest sent in base64.  Raises FrameError.

    Relative, nothing empty, no `.` and `..`, no NUL; not longer than Linux allows.
    """
    path = _bytes(text)
    parts = tuple(path.split(b"/"))
    bad = any(part in (b"", b".", b"..") or len(part) > _NAME_BYTES for part in parts)
    if bad or b"\0" in path or len(path) > _PATH_BYTES:
        raise frames.FrameError(f"a file with the path {path[:80]!r}")
    return parts


def checked_entry(payload: bytes) -> Entry:
    """The FILE frame in `payload`.  Raises FrameError or ValueError."""
    value = json.loads(payload)
    if not isinstance(value, dict):
        raise frames.FrameError("a FILE that is no object")
    kind = value.get("kind")
    if kind not in ("file", "directory", "link", "follow"):
        raise frames.FrameError(f"a file of the kind {kind!r:.40}")
    target = _bytes(value["target"]) if kind == "link" else b""
    if kind == "link" and not 0 < len(target) <= _PATH_BYTES or b"\0" in target:
        raise frames.FrameError("a symbolic link without a target")
    return Entry(
        number=_number(value, "id", (1 << 32) - 1),
        kind=kind,
        parts=checked_path(value.get("path")),
        mode=_number(value, "mode", 0o7777),
        mtime=_time(value),
        size=_number(value, "size", _BIGGEST),
        target=target,
    )


def _bytes(text: Any) -> bytes:
    try:
        return a2b_base64(text)
    except (Base64Error, TypeError, ValueError) as error:
        raise frames.FrameError(f"not base64: {text!r:.60}") from error


def _number(value: dict[str, Any], name: str, most: int) -> int:
    number = value.get(name, 0)
    if type(number) is not int or not 0 <= number <= most:
        raise frames.FrameError(f"a file with {name} {number!r:.40}")
    return number


def _time(value: dict[str, Any]) -> int:
    number = value.get("mtime", 0)
    if type(number) is not int or abs(number) > _TIME_LIMIT * 10**9:
        raise frames.FrameError(f"a file with mtime {number!r:.40}")
    return number


def shown(path: bytes | Parts) -> str:
    """A guest's name for the user's terminal: printable, and not long."""
    name = b"/".join(path) if isinstance(path, tuple) else path
    text = name.decode(errors="replace")
    return printable(text) + ("…" if len(text) > 200 else "")


class _File:
    """One file on its way.  Without a descriptor: what comes of it is dropped."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.folder: int | None = None
        self.fd: int | None = None
        self.hidden = b""  # the name that it has until it is complete, where it needs one
        self.position = entry.size if entry.kind == "follow" else 0

    def drop(self) -> None:
        """Let go of it; what is not complete goes."""
        if self.hidden and self.folder is not None:
            _attempt(os.unlink, self.hidden, self.folder)
        for fd in (self.fd, self.folder):
            if fd is not None:
                os.close(fd)
        self.fd = self.folder = None
        self.hidden = b""


def _reason(error: OSError) -> str:
    return error.strerror or f"{error}"


def _attempt(call: Callable[..., None], name: bytes, folder: int) -> None:
    try:
        call(name, dir_fd=folder)
    except OSError:
        pass


class Returned:
    """All that one guest returns, below `directory`."""

    def __init__(self, directory: str, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files: dict[int, _File] = {}
        self._folders: list[Entry] = []
        self._entries = 0
        self._owed = 0
        self.count = self.bytes = 0
        self.failures: list[str] = []
        self.unmatched: list[str] = []
        self.left_out = 0

    def close(self) -> None:
        """Drop what is not complete."""
        for file in self._files.values():
            file.drop()
        self._files.clear()
        os.close(self._root)

    def frame(self, kind: int, payload: bytes) -> None:
        """Act on a frame of the stream FILES.  Raises FrameError, ValueError or KeyError."""
        if kind == frames.FILE:
            self._begin(checked_entry(payload))
        elif kind == frames.FILE_DATA:
            self._data(payload)
        elif kind == frames.FILE_END:
            self._end(json.loads(payload))
        else:
            raise frames.FrameError(f"type {kind} on the stream of files")
        self._credit(len(payload))

    def _credit(self, count: int) -> None:
        """Give credit back in large pieces: a guest's serial line buffers 4096 bytes."""
        self._owed += count
        if self._owed >= _CREDIT_BYTES:
            self._send(frames.encode(frames.CREDIT, frames.FILES, frames.U32.pack(self._owed)))
            self._owed = 0

    def _failed(self, parts: Parts, reason: str) -> None:
        self.failures.append(f"{shown(parts)}: {reason}")
        del self.failures[_MOST_FAILURES:]

    # -- frames ------------------------------------------------------------------------------

    def _begin(self, entry: Entry) -> None:
        self._entries += 1
        if entry.number in self._files or len(self._files) >= _MOST_OPEN:
            raise frames.FrameError(f"file {entry.number} begins while others are open")
        if self._entries > _MOST_ENTRIES:
            raise frames.FrameError(f"more than {_MOST_ENTRIES} files")
        file = _File(entry)
        try:
            if entry.kind == "directory":
                self._make_directory(entry)
            elif entry.kind == "link":
                self._make_link(file)
            else:
                self._files[entry.number] = file
                self._open(file)
        except OSError as error:
            file.drop()
            self._failed(entry.parts, _reason(error))

    def _data(self, payload: bytes) -> None:
        number, offset = frames.PIECE.unpack_from(payload)
        file, data = self._files[number], payload[frames.PIECE.size :]
        end = offset + len(data)
        follows = file.entry.kind == "follow"
        most = _BIGGEST if follows else file.entry.size
        if offset < file.position or end > most or (follows and offset > file.position):
            raise frames.FrameError(f"bytes {offset} to {end} of file {number}")
        file.position = end
        if file.fd is None:
            return
        try:
            pwrite_all(file.fd, data, offset)
            self.bytes += len(data)
        except OSError as error:
            file.drop()
            self._failed(file.entry.parts, _reason(error))

    def _end(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise frames.FrameError("a FILE_END that is no object")
        file = self._files.pop(_number(value, "id", (1 << 32) - 1))
        entry = file.entry
        if "failed" in value:
            self._failed(entry.parts, shown(str(value["failed"]).encode()))
        elif file.fd is not None and file.folder is not None:
            mode, mtime = entry.mode, entry.mtime
            if entry.kind == "follow":
                mode, mtime = _number(value, "mode", 0o7777), _time(value)
            try:
                self._complete(file, file.fd, file.folder, mode, mtime)
                self.count += 1
            except OSError as error:
                self._failed(entry.parts, _reason(error))
        file.drop()

    def finish(self, report: Any) -> None:
        """The guest has sent all; `report` is what it says of that.  Raises FrameError.

        Directories get their times now, that what came into them has not changed any more.
        """
        if self._files:
            raise frames.FrameError("an EXIT before the end of a file")
        for entry in reversed(self._folders):
            try:
                fd = self._folder(entry.parts)
                try:
                    os.fchmod(fd, entry.mode & _DIRECTORY_MODE)
                    os.utime(fd, ns=(entry.mtime, entry.mtime))
                finally:
                    os.close(fd)
            except OSError as error:
                self._failed(entry.parts, _reason(error))
        self._take_report(report)

    def _take_report(self, report: Any) -> None:
        if not isinstance(report, dict):
            raise frames.FrameError("an EXIT that does not say what was returned")
        for path, reason in report.get("failed", ())[:_MOST_FAILURES]:
            self._failed((_bytes(path),), shown(str(reason).encode()))
        unmatched = report.get("unmatched", ())[:_MOST_FAILURES]
        self.unmatched = [shown(_bytes(text)) for text in unmatched]
        self.left_out = _number(report, "left_out", _MOST_ENTRIES)

    # -- this host's files -------------------------------------------------------------------

    def _folder(self, parts: Parts, make: bool = False) -> int:
        """A descriptor of the directory `parts`; no component is a symbolic link.

        `make` makes what is missing of it.
        """
        fd = os.dup(self._root)
        for depth, name in enumerate(parts):
            try:
                deeper = _deeper(name, fd, make)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                place = shown(parts[: depth + 1])
                raise OSError(error.errno, f"{place} is no directory on this host") from error
            finally:
                os.close(fd)
            fd = deeper
        return fd

    def _make_directory(self, entry: Entry) -> None:
        # Writable until what belongs into it has come.
        fd = self._folder(entry.parts, make=True)
        try:
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=fd):
                os.fchmod(fd, 0o700 | stat.S_IMODE(os.fstat(fd).st_mode))
        finally:
            os.close(fd)
        self._folders.append(entry)
        self.count += 1

    def _make_link(self, file: _File) -> None:
        entry = file.entry
        file.folder = folder = self._folder(entry.parts[:-1], make=True)
        file.hidden = _hidden_name()
        os.symlink(entry.target, file.hidden, dir_fd=folder)
        times = (entry.mtime, entry.mtime)
        os.utime(file.hidden, ns=times, dir_fd=folder, follow_symlinks=False)
        _rename(file.hidden, entry.parts[-1], folder)
        file.hidden = b""
        file.drop()
        self.count += 1

    def _open(self, file: _File) -> None:
        entry = file.entry
        file.folder = folder = self._folder(entry.parts[:-1], make=True)
        if entry.kind == "follow":
            file.fd = _open_followed(entry, folder)
            return
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            # Without a name: whatever ends this launcher, nothing half-made is left.
            file.fd = os.open(".", flags | os.O_TMPFILE, 0o600, dir_fd=folder)
        except OSError:  # not every file system can
            name = _hidden_name()
            file.fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            file.hidden = name

    def _complete(self, file: _File, fd: int, folder: int, mode: int, mtime: int) -> None:
        """Give the file its attributes and its name."""
        entry = file.entry
        if entry.kind == "file" and file.position != entry.size:
            os.ftruncate(fd, entry.size)  # it ends in a hole
        os.fchmod(fd, mode & _MODE)
        os.utime(fd, ns=(mtime, mtime))
        if entry.kind == "follow":
            return
        if not file.hidden:
            own = f"/proc/self/fd/{fd}"
            try:
                os.link(own, entry.parts[-1], dst_dir_fd=folder, follow_symlinks=True)
                return
            except FileExistsError:
                file.hidden = _hidden_name()
            os.link(own, file.hidden, dst_dir_fd=folder, follow_symlinks=True)
        _rename(file.hidden, entry.parts[-1], folder)
        file.hidden = b""


def _hidden_name() -> bytes:
    return b".apppot-" + os.urandom(8).hex().encode()


def _deeper(name: bytes, folder: int, make: bool) -> int:
    try:
        return os.open(name, _FOLDER, dir_fd=folder)
    except FileNotFoundError:
        if not make:
            raise
    os.mkdir(name, 0o777, dir_fd=folder)
    return os.open(name, _FOLDER, dir_fd=folder)


def _rename(source: bytes, name: bytes, folder: int) -> None:
    """Put `source` in the place of `name`, which may be a file, a link, or an empty directory."""
    try:
        os.rename(source, name, src_dir_fd=folder, dst_dir_fd=folder)
    except IsADirectoryError:
        os.rmdir(name, dir_fd=folder)
        os.rename(source, name, src_dir_fd=folder, dst_dir_fd=folder)


def _open_followed(entry: Entry, folder: int) -> int:
    """The file that grows: anew, or the one that is here, where the guest began with its copy."""
    name, flags = entry.parts[-1], os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if not entry.size:
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        return os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
    fd = os.open(name, flags, dir_fd=folder)
    found = os.fstat(fd)
    if stat.S_ISREG(found.st_mode) and found.st_size == entry.size:
        return fd
    os.close(fd)
    raise OSError(0, "it was changed on this host while the job ran")
