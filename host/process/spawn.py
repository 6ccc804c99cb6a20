"""Starting the virtual machine and its helpers: the launcher's long-lived children.

Each gets a session of its own, so that the terminal's keys reach only the launcher, and dies
with the launcher: the run directory's keeper sees to it, and closer by bubblewrap where it is
used, the kernel's parent-death signal elsewhere.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence

from apppot.host.common.errors import HypervisorError

_PR_SET_PDEATHSIG = 1
_OPEN_MAX = 1 << 30
_LIFTED = (
    resource.RLIMIT_NOFILE,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_AS,
    resource.RLIMIT_DATA,
    resource.RLIMIT_CPU,
)


class Child:
    """A child process that the launcher ends itself."""

    def __init__(self, pid: int, argv: Sequence[str]) -> None:
        self.pid = pid
        self.argv = tuple(argv)
        self.status: int | None = None  # wait status once it has ended

    def ended(self) -> bool:
        """Whether it has ended; collects it if so."""
        if self.status is None:
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, self.pid, options) is not None:
                self.kill()
        return self.status is not None

    def kill(self) -> None:
        """End it and its helpers at once and collect it.  Does nothing when it was collected.

        A guest kernel's threads for block devices are processes that outlive it; until it is
        collected its process group cannot be another's.
        """
        if self.status is None:
            os.killpg(self.pid, signal.SIGKILL)
            _, self.status = os.waitpid(self.pid, 0)

    def end(self, seconds: float = 60.0) -> None:
        """Ask it to clean up and end, wait for that as long as given, then kill it.

        Does nothing when it was collected.
        """
        if self.status is None:
            os.kill(self.pid, signal.SIGTERM)
            watch = os.pidfd_open(self.pid)
            select.select([watch], [], [], seconds)
            os.close(watch)
            self.kill()

    def how(self) -> str:
        """How it ended, in words."""
        if self.status is None:
            return "is running"
        if os.WIFSIGNALED(self.status):
            return f"was killed by {signal.Signals(os.WTERMSIG(self.status)).name}"
        return f"ended with status {os.WEXITSTATUS(self.status)}"


def spawn(
    argv: Sequence[str],
    *,
    output: int,
    keep: Iterable[int] = (),
    cpus: Iterable[int] = (),
    env: Mapping[str, str] | None = None,
    before_exec: Sequence[Callable[[], object]] = (),
    announce: Callable[[int], object] = bool,
) -> Child:
    """Start `argv` with stdin from /dev/null, stdout and stderr to `output`.

    `keep` are descriptors that it inherits under their numbers, `cpus` what it may run on
    (empty: what the launcher may).  `before_exec` are callables run in the child; when there are
    any, the child is also tied to the launcher's life.  `announce` gets the child's pid, which
    is also its session, before the child does anything.  Raises HypervisorError.
    """
    failed_read, failed_write = os.pipe()
    leave_read, leave_write = os.pipe()
    prctl = _load_prctl() if before_exec else None
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            if prctl is not None:
                prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
            os.setsid()
            os.close(leave_write)
            if not os.read(leave_read, 1):
                os._exit(1)  # the launcher was killed before it could announce this child
            _prepare(output, cpus)
            for action in before_exec:
                action()
            _keep_only(keep, failed_write)
            os.execvpe(argv[0], list(argv), dict(env if env is not None else os.environ))
        except OSError as error:
            os.write(failed_write, str(error.strerror or error).encode())
        except BaseException as error:
            os.write(failed_write, repr(error).encode())
        finally:
            os._exit(127)
    os.close(failed_write)
    os.close(leave_read)
    announce(pid)
    os.write(leave_write, b".")
    os.close(leave_write)
    reason = os.read(failed_read, 1000)
    os.close(failed_read)
    if reason:
        os.waitpid(pid, 0)
        raise HypervisorError(f"{argv[0]} cannot be started: {reason.decode(errors='replace')}")
    return Child(pid, argv)


def detach() -> tuple[bool, int]:
    """Fork a process that outlives this one, in a session of its own.

    Gives (True, descriptor to write to) in it, and (False, descriptor to read that) here.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        os.waitpid(pid, 0)
        return False, read
    os.setsid()
    # Not the session's leader: it never gets a terminal by opening one.
    if os.fork():
        os._exit(0)
    os.close(read)
    return True, write


def _load_prctl() -> Callable[[int, int], int]:
    """prctl(2), loaded before the fork: a child should not import."""
    import ctypes

    prctl: Callable[[int, int], int] = ctypes.CDLL(None).prctl
    return prctl


def _prepare(output: int, cpus: Iterable[int]) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, number)
    allowed = set(cpus)
    if allowed:
        os.sched_setaffinity(0, allowed)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The caller's limits are the payload's, in the guest; here they would hit its machine: the
    # memory file, the address space of the guest kernel, a descriptor per cached file of hostfs.
    for limit in _LIFTED:
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (hard, hard))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def _keep_only(keep: Iterable[int], failed: int) -> None:
    """Close all but stdio and `keep`: what a shell or batch system has open is not for a guest.

    `failed` stays until exec closes it.
    """
    start = 3
    for fd in sorted((*keep, failed)):
        os.closerange(start, fd)
        start = fd + 1
        os.set_inheritable(fd, fd != failed)
    os.closerange(start, _OPEN_MAX)


def any_stopped(pid: int) -> bool:
    """Whether the process or one of its descendants is stopped (state T)."""
    pids = [pid]
    while pids:
        current = pids.pop()
        try:
            with open(f"/proc/{current}/stat", encoding="utf-8", errors="replace") as text:
                if text.read().rpartition(")")[2].split()[0] == "T":
                    return True
            with open(f"/proc/{current}/task/{current}/children", encoding="ascii") as text:
                pids += [int(word) for word in text.read().split()]
        except OSError:
            continue
    return False
