"""A guest without a launcher: booted by a bare kernel command line, libvirt, a cloud.

The payload has the machine's console as its controlling terminal; its status is the last line
there, then the guest powers off.
"""

from __future__ import annotations

# The C module: `signal` itself imports `enum`, which the boot path does not need.
import _signal  # type: ignore[import-not-found]
import os
import time

from apppot.guest.console import log
from apppot.guest.merge import root
from apppot.guest.payload import process, sources
from apppot.guest.protocol.job import USER, JobError

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from apppot.guest.protocol.job import Job

# Terminals of their own: /dev/console cannot be a controlling one.
_CONSOLES = ("tty0", "ttyS0", "hvc0", "console")


def serve(job: Job, consoles: list[str]) -> None:
    """Run the job, or without one a login shell, on the console; then return.

    `consoles` are the kernel's own by name, the one that it prefers last.
    """
    account = _account(job)
    argv = job.argv
    if not argv and job.run_scripts:
        argv = [path.encode() for path in sources.scripts(root.ROOT)[:1]]
    console = _open_console([*reversed(consoles), *_CONSOLES])
    # The account may open its own terminal again by name.
    os.chown(console, account.uid, -1)
    status = _wait(_start(job, account, argv, console))
    _end_the_rest()
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
    log(f"the job ended with status {code}")


def _account(job: Job) -> process.Account:
    try:
        return process.find_account(job)
    except JobError as error:
        log(f"{error}: the job runs as {USER!r}")
        job.user = USER
        return process.find_account(job)


def _start(job: Job, account: process.Account, argv: list[bytes], console: int) -> int:
    failed_read, failed_write = os.pipe()  # close-on-exec: end of file means that exec worked
    pid = os.fork()
    if pid == 0:
        stdio = (console, console, console)
        process.become_payload(job, account, argv, root.ROOT, stdio, True, failed_write)
    os.close(failed_write)
    os.close(console)
    report = os.read(failed_read, 4096)
    os.close(failed_read)
    if report:
        number, what, _ = process.failure(report)
        log(f"{what}: {os.strerror(number)}")
    return pid


def _open_console(names: list[str]) -> int:
    """The first of the terminals /dev/NAME that opens."""
    for name in names:
        try:
            fd = os.open(f"/dev/{name}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            continue
        if os.isatty(fd):
            return fd
        os.close(fd)
    raise OSError("no console can be opened")


def _wait(payload: int) -> int:
    """The payload's wait status; other processes are collected as they end."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == payload:
            return status


def _end_the_rest() -> None:
    """End what the job left running: an open file would keep the root from being clean."""
    for number in (_signal.SIGTERM, _signal.SIGKILL):
        try:
            os.kill(-1, number)
        except ProcessLookupError:
            pass
        if _all_collected(1.0):
            return


def _all_collected(seconds: float) -> bool:
    """Collect what ends within `seconds`; whether no process is left (orphans are PID 1's)."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            time.sleep(0.01)
    return False
