"""Starting the payload: account, descriptors, terminal, limits, exec.

This is the guest's one place that forks and executes.
"""

from __future__ import annotations

# The C module: `signal` itself imports `enum`, which the boot path does not need.
import _signal  # type: ignore[import-not-found]
import fcntl
import os

# Imported here, not where it is used: the payload's child has left the pot's root by then.
import resource
import struct

from apppot.guest import syscalls
from apppot.guest.merge.root import ROOT
from apppot.guest.protocol.job import JOB_DIR, USER, JobError

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any

    from apppot.guest.protocol.job import Job

_TIOCSCTTY, _TIOCSWINSZ, _TIOCGPTN, _TIOCSPTLCK = 0x540E, 0x5414, 0x80045430, 0x40045431
_F_SETPIPE_SZ = 1031
# What a child that could not become the payload says: errno, and whether exec itself failed.
_REPORT = struct.Struct("<i?")
# Room for a writer to run ahead of the agent: fewer switches between the two.
_PIPE_BYTES = 1 << 18


class Account:
    """Who the payload runs as."""

    def __init__(self, name: str, uid: int, gid: int, groups: list[int], home: str, shell: str):
        self.name, self.uid, self.gid = name, uid, gid
        self.groups, self.home, self.shell = groups, home, shell


def find_account(job: Job, root: str = ROOT) -> Account:
    """The account that `job.user` names in the guest: `user`, a name, UID or UID:GID.

    Raises JobError when the image has no such account.
    """
    name, _, group = job.user.partition(":")
    if name == USER and job.uid == 0:
        name = "root"
    entries = _entries(f"{root}/etc/passwd", 7)
    entry = next((e for e in entries if name in (e[0], e[2])), None)
    if entry is None and not name.isdigit():
        known = ", ".join([e[0] for e in entries][:8])
        raise JobError(f"the image has no account {name!r}; it has {known} …")
    if entry is None:
        entry = [name, "x", name, "0", "", "/", "/bin/sh"]
    gid = int(group) if group.isdigit() else int(entry[3])
    groups = {int(e[2]) for e in _entries(f"{root}/etc/group", 4) if entry[0] in e[3].split(",")}
    if entry[0] == USER:
        groups.update(number for number, _ in job.groups)
    home, shell = entry[5] or "/", entry[6] or "/bin/sh"
    return Account(entry[0], int(entry[2]), gid, sorted(groups | {gid}), home, shell)


def _entries(path: str, fields: int) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as text:
            rows = [line.rstrip("\n").split(":") for line in text]
    except FileNotFoundError:
        return []
    return [row for row in rows if len(row) == fields and row[2].isdigit()]


class Payload:
    """A payload that was started, seen from the agent.

    `stdin`, `stdout` and `stderr` are the agent's ends, non-blocking; with a terminal stdin and
    stdout are both its master side and stderr is None.  `error` is (errno, what) when the
    command could not be executed.
    """

    def __init__(self, pid: int, stdin: int | None, stdout: int | None, stderr: int | None):
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.error: tuple[int, str] | None = None


def start(
    job: Job, account: Account, argv: list[bytes], root: str = ROOT, joined: int | None = None
) -> Payload:
    """Start `argv` in the merged root and return once its exec has succeeded or failed.

    `joined` is a process whose mounts it shares.  Raises OSError where it could not be prepared.
    """
    failed_read, failed_write = os.pipe()  # close-on-exec: end of file means that exec worked
    ours, theirs = _terminal(job, account, root) if job.tty else _pipes(account)
    pid = os.fork()
    if pid == 0:
        become_payload(job, account, argv, root, theirs, job.tty, failed_write, joined)
    os.close(failed_write)
    for fd in set(theirs):
        os.close(fd)
    payload = Payload(pid, *ours)
    for end in set(ours) - {None}:
        os.set_blocking(end, False)  # type: ignore[arg-type]
    report = os.read(failed_read, 4096)
    os.close(failed_read)
    if report:
        number, what, executing = failure(report)
        if not executing:
            for end in set(ours) - {None}:
                os.close(end)  # type: ignore[arg-type]
            raise OSError(number, f"{what}: {os.strerror(number)}")
        payload.error = (number, what)
    return payload


def failure(report: bytes) -> tuple[int, str, bool]:
    """What a child said that could not become the payload: errno, what, whether exec failed."""
    number, executing = _REPORT.unpack_from(report)
    return number, report[_REPORT.size :].decode("utf-8", "replace"), executing


def _pipes(account: Account) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    stdin_read, stdin_write = os.pipe()
    stdout_read, stdout_write = os.pipe()
    stderr_read, stderr_write = os.pipe()
    for fd in (stdin_write, stdout_read):
        fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_BYTES)
    # A script's `>/dev/stderr` opens it anew, which only its owner may.
    for fd in (stdin_read, stdout_write, stderr_write):
        os.fchown(fd, account.uid, account.gid)
    return (stdin_write, stdout_read, stderr_read), (stdin_read, stdout_write, stderr_write)


def _terminal(
    job: Job, account: Account, root: str
) -> tuple[tuple[int, int, None], tuple[int, int, int]]:
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    master = os.open(f"{root}/dev/pts/ptmx", flags)
    fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("<i", 0))
    (number,) = struct.unpack("<i", fcntl.ioctl(master, _TIOCGPTN, bytes(4)))
    path = f"{root}/dev/pts/{number}"
    slave = os.open(path, flags)
    os.chown(path, account.uid, -1)
    resize(master, job.rows, job.columns)
    return (master, os.dup(master), None), (slave, slave, slave)


def resize(master: int, rows: int, columns: int) -> None:
    """Tell the terminal behind `master` its size; the payload gets SIGWINCH."""
    fcntl.ioctl(master, _TIOCSWINSZ, struct.pack("<HHHH", rows, columns, 0, 0))


def become_payload(
    job: Job,
    account: Account,
    argv: list[bytes],
    root: str,
    stdio: tuple[int, int, int],
    terminal: bool,
    failed: int = 2,
    joined: int | None = None,
) -> None:
    """In a forked child: become the payload, or write to `failed` why not.  Never returns.

    `terminal` says that `stdio` is one; it becomes the payload's controlling terminal.
    """
    what, executing = "prepare the payload", False
    try:
        os.setsid()
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        if terminal:
            fcntl.ioctl(0, _TIOCSCTTY, 0)
        if joined is None:
            enter_root(root)
        else:
            join_mounts(joined)
        directory = job.cwd if job.cwd is not None else default_directory(job, account)
        what = f"working directory {os.fsdecode(directory)}"
        os.chdir(directory)
        # Before the ids are the payload's: it must not be able to end who watches it.
        if terminal:
            _lead_session(failed)
        what = "set the limits and ids"
        _become(job, account)
        for number in job.closed:
            os.close(number)
        command = argv or [b"-" + os.path.basename(os.fsencode(account.shell))]
        program = argv[0] if argv else os.fsencode(account.shell)
        what, executing = os.fsdecode(program), True
        _execute(program, command, environment(job, account))
    except OSError as error:
        report = _REPORT.pack(error.errno or 5, executing)
        os.write(failed, report + what.encode("utf-8", "surrogateescape"))
    except BaseException as error:
        os.write(failed, _REPORT.pack(5, False) + f"{what}: {error!r}".encode()[:1000])
    finally:
        os._exit(127)


# What the leader of a terminal's session hands on to the payload's process group.
_HANDED_ON = (
    *(_signal.SIGHUP, _signal.SIGINT, _signal.SIGQUIT, _signal.SIGTERM, _signal.SIGUSR1),
    *(_signal.SIGUSR2, _signal.SIGALRM, _signal.SIGXCPU, _signal.SIGTSTP),
)


def _lead_session(failed: int) -> None:
    """Fork: return in the child, which has the terminal; its parent leads the session.

    The kernel ignores Ctrl-Z in a process group that nobody of its session watches.  The leader
    watches: when the payload stops it stops too, which the agent sees, and continues it when it
    is continued; it ends as the payload ends.
    """
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        _signal.signal(_signal.SIGTTOU, _signal.SIG_IGN)
        os.tcsetpgrp(0, os.getpid())
        _signal.signal(_signal.SIGTTOU, _signal.SIG_DFL)
        return
    os.close(failed)
    _signal.set_wakeup_fd(-1)  # the agent's own
    for number in _HANDED_ON:
        _signal.signal(number, lambda number, _: os.killpg(pid, number))
    _, status = os.waitpid(pid, os.WUNTRACED)
    while os.WIFSTOPPED(status):
        os.kill(os.getpid(), _signal.SIGSTOP)
        os.killpg(pid, _signal.SIGCONT)
        _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.WTERMSIG(status) != _signal.SIGKILL:
            _signal.signal(os.WTERMSIG(status), _signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def enter_root(root: str) -> None:
    """Make `root` this process's root, in a mount namespace that knows nothing else.

    A chroot would do less: inside one, user namespaces (containers) are refused.
    """
    if root == "":
        return
    syscalls.unshare(syscalls.CLONE_NEWNS)
    os.chdir(root)
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
    syscalls.pivot_root(".", ".")
    syscalls.umount(".", syscalls.MNT_DETACH)
    os.chdir("/")


def join_mounts(pid: int) -> None:
    """Share the mounts of process `pid`, its root among them."""
    fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.setns(fd, syscalls.CLONE_NEWNS)
    os.close(fd)


def default_directory(job: Job, account: Account) -> str | bytes:
    """Where a payload starts whose job does not say."""
    if job.has_job_dir():
        return JOB_DIR
    return account.home if os.path.isdir(account.home) else "/"


def environment(job: Job, account: Account) -> dict[bytes, bytes]:
    """The payload's environment: the job's, over what the account says."""
    name = account.name.encode()
    own = {
        b"HOME": account.home.encode(),
        b"USER": name,
        b"LOGNAME": name,
        b"SHELL": account.shell.encode(),
        b"PATH": job.search_path,
    }
    return {**own, **job.env}


def _become(job: Job, account: Account) -> None:
    for name, (soft, hard) in job.rlimits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
    if job.umask is not None:
        os.umask(job.umask)
    os.setgroups(account.groups)
    os.setgid(account.gid)
    os.setuid(account.uid)
    # Python ignores these two; a program expects them as the kernel gives them.
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)


def _execute(program: bytes, argv: list[bytes], env: dict[bytes, bytes]) -> None:
    """execvpe(3): search PATH, and give a script without `#!` to the shell."""
    if b"/" in program:
        _exec_or_shell(program, argv, env)
    denied: OSError | None = None
    for directory in env[b"PATH"].split(b":"):
        try:
            _exec_or_shell(os.path.join(directory or b".", program), argv, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            denied = error
    raise denied or FileNotFoundError(2, "not found")


def _exec_or_shell(path: bytes, argv: list[bytes], env: dict[bytes, bytes]) -> None:
    try:
        os.execve(path, argv, env)
    except OSError as error:
        if error.errno != 8:  # ENOEXEC
            raise
    with open(path, "rb") as text:
        # What is neither a program of this machine nor text is no script either.
        if b"\0" in text.read(256):
            raise PermissionError(13, "exec format error")
    os.execve(b"/bin/sh", [b"/bin/sh", path, *argv[1:]], env)


def exit_code(status: int) -> int:
    """A wait status as a shell says it."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def reap(options: int = os.WNOHANG) -> tuple[list[tuple[int, int, Any]], bool]:
    """Collect every process that has ended, and whether any is left; PID 1 inherits all orphans.

    Of each: pid, wait status, resource use.  `options` are wait4's: 0 waits for the first to end,
    WUNTRACED reports those that have been stopped, too.
    """
    ended: list[tuple[int, int, Any]] = []
    while True:
        try:
            pid, status, usage = os.wait4(-1, options)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        ended.append((pid, status, usage))
        options |= os.WNOHANG


def signal_all(number: int) -> None:
    """Signal every process but this one, which is PID 1; there may be none left."""
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        pass


def wake_on_children() -> int:
    """A descriptor that can be read when a child has ended; call it before the first starts."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    _signal.signal(_signal.SIGCHLD, lambda *_: None)
    _signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return read
