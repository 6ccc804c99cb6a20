"""A guest without a launcher: booted by a bare kernel command line, libvirt, a cloud.

The payload has the machine's console as its controlling terminal; or, where its outputs go
somewhere, two pipes that are copied there.  Without a payload there is a login shell on each
console: screen and serial line.  The status is the last line on all of them, then the guest powers
off.
"""

from __future__ import annotations

# The C module: `signal` itself imports `enum`, which the boot path does not need.
import _signal  # type: ignore[import-not-found]
import fcntl
import os
import time

from apppot.guest import syscalls
from apppot.guest.console import log, show_on
from apppot.guest.init import dhcp, surroundings
from apppot.guest.merge import root, scratch
from apppot.guest.payload import process, sources
from apppot.guest.payload.configdrive import Answer
from apppot.guest.protocol.job import JOB_DIR, USER, Job, JobError

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any

# Terminals of their own: /dev/console cannot be a controlling one.
_CONSOLES = ("tty0", "ttyS0", "hvc0", "console")
_TIOCGSERIAL, _SERIAL_BYTES = 0x541E, 72  # linux/serial.h; a `serial_struct` begins with the type
_SCRIPT = "/run/apppot-script"
_TERMINAL = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
_FAILED = 125
_NO_ENTRY = 2  # ENOENT


class Standalone:
    """What a guest without a launcher knows of its job."""

    def __init__(self, line: sources.CommandLine, named: Job | None) -> None:
        _signal.signal(_signal.SIGINT, _interrupted)
        syscalls.take_ctrl_alt_del()
        self.terminals = _terminals(line.consoles)
        show_on(self.terminals)
        answer, self.lease = surroundings.find(line, named)
        self.answer: Answer = answer
        self.job: Job = answer.job
        self.disk: str | None = None

    def serve(self) -> None:
        """Run the job on the preferred console, or without one login shells; then return."""
        account = self._account()
        argv = self._command()
        self._keep_lease()
        self._job_directory(account)
        if argv and self._comes_back():
            # A job that is heard of elsewhere needs no console.
            self._captured(account, argv)
            return
        if not self.terminals:
            raise OSError("no console can be opened")
        # A shell on each: nobody knows where its user sits.  Who leaves the first ends them all.
        chosen = self.terminals[:1] if argv else self.terminals
        status = _wait({self._start(account, argv, terminal) for terminal in chosen})
        _end_the_rest()
        log(f"the job ended with status {process.exit_code(status)}")

    def failed(self, reason: str) -> None:
        """Say where the job's outputs would have gone that it could not run."""
        if self._comes_back():
            about = {"status": _FAILED, "error": reason}
            self._send(about, os.path.dirname(scratch.POINT))

    def _account(self) -> process.Account:
        try:
            return process.find_account(self.job)
        except JobError as error:
            log(f"{error}: the job runs as {USER!r}")
            self.job.user = USER
            return process.find_account(self.job)

    def _command(self) -> list[bytes]:
        """What is executed; empty for a login shell."""
        job = self.job
        if job.script is not None:
            path = root.ROOT + _SCRIPT
            with open(path, "wb") as file:
                file.write(job.script)
            os.chmod(path, 0o755)
            return [_SCRIPT.encode(), *job.argv]
        if not job.argv and job.run_scripts:
            return [path.encode() for path in sources.scripts(root.ROOT)[:1]]
        return job.argv

    def _job_directory(self, account: process.Account) -> None:
        """Make the job directory where the job is to start in it, and nobody shows one."""
        if self.job.cwd == JOB_DIR.encode() and not os.path.isdir(root.ROOT + JOB_DIR):
            os.makedirs(root.ROOT + JOB_DIR)
            os.chown(root.ROOT + JOB_DIR, account.uid, account.gid)

    def _keep_lease(self) -> None:
        lease: dhcp.Lease | None = self.lease
        if lease is not None and os.fork() == 0:
            try:
                dhcp.renew(lease)
            except OSError as error:
                log(f"the address {lease.address} is not renewed: {error}")
            finally:
                os._exit(0)

    def _comes_back(self) -> bool:
        """Whether somebody wants to know how the job went."""
        from apppot.guest.payload import report

        wanted = self.job.report
        named = wanted.disk if wanted is not None else None
        self.disk = named or report.find_disk(sources.block_devices())
        return self.disk is not None or wanted is not None

    def _start(self, account: process.Account, argv: list[bytes], terminal: str) -> int:
        console = os.open(terminal, _TERMINAL)
        # The account may open its own terminal again by name.
        os.chown(console, account.uid, -1)
        failed_read, failed_write = os.pipe()  # close-on-exec: end of file means that exec worked
        pid = os.fork()
        if pid == 0:
            self.job.env.setdefault(b"TERM", _terminal_type(terminal))
            stdio = (console, console, console)
            process.become_payload(self.job, account, argv, root.ROOT, stdio, True, failed_write)
        os.close(failed_write)
        os.close(console)
        report = os.read(failed_read, 4096)
        os.close(failed_read)
        if report:
            number, what, _ = process.failure(report)
            log(f"{what}: {os.strerror(number)}")
        return pid

    def _captured(self, account: process.Account, argv: list[bytes]) -> None:
        """Run the job with its streams in pipes, and send back what it leaves."""
        from apppot.guest.payload import capture, report

        work = f"{scratch.POINT}/report"
        os.makedirs(work)
        self.job.tty = False
        wake = process.wake_on_children()
        started = process.start(self.job, account, argv)
        consoles = [os.open(terminal, _TERMINAL) for terminal in self.terminals]
        ended = capture.follow(started, work, consoles, wake, _end_the_rest)
        about = report.describe(ended)
        if started.error is not None:
            number, what = started.error
            about["status"] = 127 if number == _NO_ENTRY else 126
            about["error"] = f"{what}: {os.strerror(number)}"
            log(about["error"])
        log(f"the job ended with status {self._send(about, work)}")

    def _send(self, ended: dict[str, Any], work: str) -> int:
        """Send outputs and status, of which `ended` is a part; the machine's last word."""
        from apppot.guest.payload import report

        about: dict[str, Any] = {"version": 1, "error": None, **ended}
        uname = os.uname()
        about["kernel"], about["machine"] = uname.release, uname.machine
        about["hostname"], about["instance"] = self.job.hostname, self.answer.instance
        about["source"] = self.answer.source
        folder = root.ROOT + JOB_DIR
        found, about["missing"] = report.collect(root.ROOT, folder, self.job.outputs)
        about["outputs"] = list(found)
        outputs = report.Outputs(about, work, found)
        problems = report.send(outputs, self.job.report, self.disk)
        for text in problems:
            log(f"the job's status {about['status']} is not reported: {text}")
        return _FAILED if problems else int(about["status"])


def _interrupted(*_: object) -> None:
    raise OSError("somebody has pressed Ctrl-Alt-Del")


def _terminals(consoles: list[str]) -> list[str]:
    """The kernel's consoles that are there, as paths, the preferred one first.

    `consoles` are their names, the preferred one last.  Where none of them is there, the first
    terminal that is.
    """
    named = [f"/dev/{name}" for name in dict.fromkeys(reversed(consoles))]
    found = [path for path in named if _is_there(path)]
    return found or [path for path in [f"/dev/{name}" for name in _CONSOLES] if _is_there(path)][:1]


def _is_there(path: str) -> bool:
    """Whether a terminal opens, and has a device behind it: the kernel names four serial lines."""
    try:
        fd = os.open(path, _TERMINAL)
    except OSError:
        return False
    try:
        kind = fcntl.ioctl(fd, _TIOCGSERIAL, bytes(_SERIAL_BYTES))[:4]
    except OSError:  # no serial line
        kind = b"other"
    try:
        return os.isatty(fd) and kind != bytes(4)
    finally:
        os.close(fd)


def _terminal_type(path: str) -> bytes:
    """TERM: what understands the words of the screen, or of what people have at a serial line."""
    return b"linux" if path.removeprefix("/dev/tty").isdigit() else b"vt220"


def _wait(payloads: set[int]) -> int:
    """The wait status of the first that ends; other processes are collected as they end."""
    left = True
    while left:
        ended, left = process.reap(0)
        for pid, status, _ in ended:
            if pid in payloads:
                return status
    raise OSError("the job has ended unseen")


def _end_the_rest() -> None:
    """End what the job left running: an open file would keep the root from being clean."""
    for number in (_signal.SIGTERM, _signal.SIGKILL):
        process.signal_all(number)
        if _all_collected(1.0):
            return


def _all_collected(seconds: float) -> bool:
    """Collect what ends within `seconds`; whether no process is left."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        _, left = process.reap()
        if not left:
            return True
        time.sleep(0.01)
    return False
