"""A guest without a launcher: booted by a bare kernel command line, libvirt, a cloud.

The payload has the machine's console; its status is printed there, then the guest powers off.
"""

from __future__ import annotations

import os

from apppot.guest import syscalls
from apppot.guest.console import log
from apppot.guest.merge import root
from apppot.guest.payload import process, sources

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from apppot.guest.protocol.job import Job

_CONSOLES = ("/dev/tty0", "/dev/ttyS0", "/dev/console")


def serve(job: Job) -> None:
    """Run the job, or without one a login shell, on the console; then return."""
    account = process.find_account(job)
    argv = job.argv or [path.encode() for path in sources.scripts(root.ROOT)[:1]]
    status = _wait(_start(job, account, argv))
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
    log(f"the job ended with status {code}")


def _start(job: Job, account: process.Account, argv: list[bytes]) -> int:
    console = _open_console()
    pid = os.fork()
    if pid == 0:
        process.become_payload(job, account, argv, root.ROOT, (console, console, console), True)
    os.close(console)
    return pid


def _open_console() -> int:
    """The first console that is a terminal of its own: /dev/console cannot be a controlling one."""
    for path in _CONSOLES:
        try:
            return os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            continue
    raise OSError("no console can be opened")


def _wait(payload: int) -> int:
    """The payload's wait status; other processes are collected as they end."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == payload:
            return status


def release(points: list[str]) -> None:
    """Unmount what is written to, so that nothing is lost at power-off."""
    os.sync()
    for point in [root.ROOT, *reversed(points)]:
        try:
            syscalls.umount(point, syscalls.MNT_DETACH)
        except OSError as error:
            log(f"{error}")
