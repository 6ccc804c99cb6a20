"""Who calls, from where and with which limits: what a payload inherits from its caller."""

from __future__ import annotations

import os
import resource
from dataclasses import replace

from apppot.host.common import terminal
from apppot.host.common.frozen import frozen

# Limits that a program can feel.  NPROC and MEMLOCK speak of the host's other processes.
_LIMITS = ("CORE", "CPU", "FSIZE", "DATA", "STACK", "NOFILE", "AS")
_PROXIES = (b"http_proxy", b"https_proxy", b"ftp_proxy", b"no_proxy", b"all_proxy")
_LOCALTIME = "/etc/localtime"
_LOCALTIME_BYTES = 64 << 10


@frozen
class Caller:
    """The launcher's own process, as far as the payload should be like it."""

    uid: int
    gid: int
    groups: tuple[tuple[int, str], ...]  # supplementary, with the names that /etc/group gives
    umask: int
    rlimits: dict[str, list[int]]
    env: dict[bytes, bytes]
    localtime: bytes | None
    closed: tuple[int, ...]  # of 0, 1, 2: not open
    terminals: tuple[int, ...]  # of 0, 1, 2: terminals
    foreground: bool  # may read the terminal that is its stdin

    @classmethod
    def of_this_process(cls) -> Caller:
        """Read it from the process and the host's files; no name service is asked."""
        return cls(
            uid=os.getuid(),
            gid=os.getgid(),
            groups=_groups(),
            umask=_umask(),
            rlimits={name: _limit(name) for name in _LIMITS},
            env=dict(os.environb),
            localtime=_localtime(),
            closed=CLOSED,
            terminals=tuple(fd for fd in (0, 1, 2) if terminal.is_terminal(fd)),
            foreground=_foreground(),
        )

    def neutral(self) -> Caller:
        """The same on every host: for building images, which must not know who built them."""
        proxies = {name: value for name, value in self.env.items() if name.lower() in _PROXIES}
        return replace(
            self, uid=1000, gid=1000, groups=(), umask=0o022, env=proxies, localtime=None
        )

    def wants_terminal(self, asked: bool | None, *, stdin: bool, shell: bool) -> bool:
        """Whether the payload gets a terminal: as asked, else where stdin and stdout are such."""
        if asked is not None:
            return asked
        if not stdin or not self.foreground or 0 not in self.terminals:
            return False
        return 1 in self.terminals or shell

    @property
    def can_read_stdin(self) -> bool:
        """False in the background: reading the terminal would stop the launcher."""
        return self.foreground or 0 not in self.terminals


def hold_standard_descriptors() -> tuple[int, ...]:
    """Put /dev/null where 0, 1 or 2 are closed, before a file lands there; the closed ones."""
    closed = []
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
            fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
    return tuple(closed)


CLOSED = hold_standard_descriptors()


def _groups() -> tuple[tuple[int, str], ...]:
    wanted = set(os.getgroups()) - {os.getgid()}
    names: dict[int, str] = {}
    try:
        # Not the grp module: a directory service that does not answer must not stop a job.
        with open("/etc/group", encoding="utf-8", errors="surrogateescape") as text:
            for line in text:
                fields = line.split(":")
                if len(fields) == 4 and fields[2].isdigit():
                    names.setdefault(int(fields[2]), fields[0])
    except OSError:
        pass
    return tuple((gid, names.get(gid, f"group{gid}")) for gid in sorted(wanted))


def _foreground() -> bool:
    """False for a job that a shell has put behind: touching the terminal would stop it."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # not a terminal, or not the one that controls us
        return True


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _limit(name: str) -> list[int]:
    soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return [soft, hard]


def _localtime() -> bytes | None:
    try:
        with open(_LOCALTIME, "rb") as file:
            data = file.read(_LOCALTIME_BYTES + 1)
    except OSError:
        return None
    return data if data.startswith(b"TZif") and len(data) <= _LOCALTIME_BYTES else None
