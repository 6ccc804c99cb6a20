"""Telling how a job went, and bringing back its outputs, without a launcher.

By HTTP PUT of a status and a compressed tar; or onto an output disk, as one tar without a file
system.  The tar's first member is the status, then come what the job wrote to its two streams,
and its outputs below `job/`.
"""

from __future__ import annotations

import io
import os
import tarfile

from apppot.guest.payload import matches
from apppot.guest.payload.process import exit_code
from apppot.guest.protocol import globs
from apppot.guest.protocol.jsonlite import dumps

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from apppot.guest.payload.capture import Ended
    from apppot.guest.protocol.job import Report

STATUS_MEMBER = "apppot/status.json"
DISK_MARK = b"APPPOT-OUT"
_BLOCK = 512
_ARCHIVE, _AUTHORITIES = "outputs.tar.gz", "authorities.pem"


class ReportError(OSError):
    """The status or the outputs did not arrive."""


def find_disk(devices: Iterable[str]) -> str | None:
    """The disk that begins with DISK_MARK: it offers itself for the outputs."""
    for device in devices:
        try:
            with open(device, "rb") as disk:
                if disk.read(len(DISK_MARK)) == DISK_MARK:
                    return device
        except OSError:
            continue
    return None


def describe(ended: Ended) -> dict[str, Any]:
    """What the status says of a payload that ran."""
    status, usage = ended.status, ended.usage
    assert status is not None
    return {
        "status": exit_code(status),
        "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        "started": round(ended.started, 3),
        "ended": round(ended.ended, 3),
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "max_memory_bytes": usage.ru_maxrss * 1024,
    }


def collect(root: str, folder: str, patterns: list[bytes]) -> tuple[dict[str, str], list[str]]:
    """(what matches: name -> path for this process; patterns that are not, or not all, there).

    `root` is the job's root and `folder` the job directory; see `matches` for what patterns name.
    """
    found: dict[bytes, bytes] = {}
    missing = []
    for pattern in patterns:
        try:
            matched = _match(root, folder, pattern)
        except (OSError, globs.GlobError):
            matched = {}
        # Of two files of one name, the first has it.
        whole = [matches.same(found.setdefault(name, at), at) for name, at in matched.items()]
        if not whole or not all(whole):
            missing.append(os.fsdecode(pattern))
    named = {os.fsdecode(name): os.fsdecode(at) for name, at in found.items()}
    return named, missing


def _match(root: str, folder: str, pattern: bytes) -> dict[bytes, bytes]:
    """Name -> path of what one pattern names."""
    fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        named = matches.find(fd, os.fsencode(folder), pattern)
        return {name: os.path.join(place, path) for place, path, name in named}
    finally:
        os.close(fd)


def write_tar(
    stream: Any, status: bytes, logs: dict[str, str], outputs: dict[str, str], kind: str
) -> None:
    """Write the tar; `logs` and `outputs` are names and paths, the latter go below job/."""
    mode: Any = f"w:{kind}"
    with tarfile.open(fileobj=stream, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        head = tarfile.TarInfo(STATUS_MEMBER)
        head.size = len(status)
        archive.addfile(head, io.BytesIO(status))
        for name, path in logs.items():
            archive.add(path, name)
        for name, path in outputs.items():
            archive.add(path, os.path.join("job", name))


class Outputs:
    """What goes back: `status` is filled, `found` are names and paths of the job's outputs."""

    def __init__(self, status: dict[str, Any], work: str, found: dict[str, str]) -> None:
        self.status, self.work, self.found = status, work, found
        names = [name for name in ("stdout", "stderr") if os.path.exists(f"{work}/{name}")]
        self.logs = {f"apppot/{name}": f"{work}/{name}" for name in names}

    def _write(self, stream: Any, kind: str) -> None:
        status = dumps(self.status).encode("ascii") + b"\n"
        write_tar(stream, status, self.logs, self.found, kind)

    def to_disk(self, device: str) -> None:
        """Write all to the disk.  Its first block comes last: half an archive is none."""
        with open(device, "r+b") as disk:
            size = disk.seek(0, os.SEEK_END)
            held = _Held(disk, size)
            self._write(held, "")
            held.finish()

    def to_web(self, report: Report) -> None:
        """PUT the outputs, then the status, which says that they have arrived."""
        from apppot.guest.payload import web

        authorities = None
        if report.ca is not None:
            authorities = f"{self.work}/{_AUTHORITIES}"
            with open(authorities, "w", encoding="utf-8") as text:
                text.write(report.ca)
        url = report.outputs_url()
        if url is not None:
            path = f"{self.work}/{_ARCHIVE}"
            with open(path, "wb") as file:
                self._write(file, "gz")
            headers = {"Content-Type": "application/gzip", **report.headers}
            web.patiently("PUT", url, headers, lambda: open(path, "rb"), authorities=authorities)
        url = report.status_url()
        if url is not None:
            body = dumps(self.status).encode("ascii") + b"\n"
            headers = {"Content-Type": "application/json", **report.headers}
            web.patiently("PUT", url, headers, lambda: body, authorities=authorities)


class _Held:
    """A disk that is written from its second block on; its first is no tar's until `finish`."""

    def __init__(self, disk: Any, size: int) -> None:
        self._disk, self._size, self._at = disk, size, 0
        self._first = b""
        disk.seek(0)
        disk.write(DISK_MARK.ljust(_BLOCK, b"\0"))
        disk.flush()
        os.fsync(disk.fileno())

    def tell(self) -> int:
        return self._at

    def write(self, data: bytes) -> int:
        if self._at + len(data) > self._size:
            raise ReportError(28, f"the output disk of {self._size} bytes is too small")
        self._at += len(data)
        missing = _BLOCK - len(self._first)
        self._first += data[:missing]
        self._disk.write(data[missing:] if missing else data)
        return len(data)

    def finish(self) -> None:
        self._disk.flush()
        os.fsync(self._disk.fileno())
        self._disk.seek(0)
        self._disk.write(self._first)
        self._disk.flush()
        os.fsync(self._disk.fileno())


def send(outputs: Outputs, report: Report | None, disk: str | None) -> list[str]:
    """Send all to where it is wanted; what went wrong, empty when it arrived."""
    problems = []
    if disk is not None:
        try:
            outputs.to_disk(disk)
        except (OSError, tarfile.TarError) as error:
            problems.append(f"output disk {disk}: {error}")
    if report is not None and (report.outputs_url() or report.status_url()):
        if problems:
            outputs.status["error"] = "; ".join(problems)
        try:
            outputs.to_web(report)
        except (OSError, tarfile.TarError) as error:
            problems.append(f"{error}")
    return problems
