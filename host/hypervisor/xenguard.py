"""The guard of one Xen domain: makes it, carries its channel and console, and leaves nothing of it.

    xenguard.py CHANNEL NETWORK XL PLACE CONFIGURATION \
        [disk ro|rw FILE DEVICE | share ro|rw PATH TAG]…

NETWORK is a descriptor of the network helper's, or - for none.

A program of its own, by path and with the standard library only.  Whatever ends it, its reaper, a
process of another session, destroys the domain; when it ends by itself or by SIGTERM, it has waited
for that.  stdout and stderr are the guest's console and what xl says.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Names of domains that have a guard or a reaper, as locked files: gone when this host boots.
KNOWN = "/run/apppot-xen"
# The console comes in portions of 200 ms (xenconsoled's limit of events).
_QUIET_MS = 1000
_DESTROY_ATTEMPTS = 20
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Xen's own script for disks takes seconds, and checks what is known here; that for networks changes
# this host's.
_ATTACH = """#!/bin/sh
case $1 in
    add) device=$(stat -Lc %t:%T "$(xenstore-read "$XENBUS_PATH/params")") &&
        xenstore-write "$XENBUS_PATH/physical-device" "$device" || exit ;;
    online) ;;
    *) exit 0 ;;
esac
exec xenstore-write "$XENBUS_PATH/hotplug-status" connected
"""


class GuardError(Exception):
    """The domain cannot be made."""


@dataclass(frozen=True)
class Item:
    """A disk or a directory: `path` is shown as `name`."""

    kind: str
    writable: bool
    path: str
    name: str


def main(argv: Sequence[str]) -> int:
    channel, network, xl, place, configuration, *rest = argv
    os.environ["PATH"] = f"{os.path.dirname(xl)}:{_PATH}"
    quads = zip(*[iter(rest)] * 4, strict=True)
    items = [Item(kind, mode == "rw", path, name) for kind, mode, path, name in quads]
    name = os.path.basename(os.path.dirname(place))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # No tool, and nothing that a tool leaves running, may hold the channel open.
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the directory's own
            os.set_inheritable(int(fd), int(fd) < 3)
    try:
        sweep()
        with contextlib.ExitStack() as last, reaped(name), contextlib.ExitStack() as first:
            show_directories(items, place)
            attach_disks(items, place, first)
            if network != _NO_NETWORK:
                load_back_end()
            create(configuration, place)
            if network != _NO_NETWORK:
                last.callback(end, attach_network(int(network), name))
            line = connect(int(channel), name, place)
            if run("xl", "unpause", name):
                raise GuardError("xl unpause failed")
            line.carry()
    except (GuardError, OSError) as error:
        print(f"xen: {error}", file=sys.stderr)
        return 1
    return 0


# -- processes -------------------------------------------------------------------------------


def run(*words: str, quiet: bool = False) -> int:
    """Run a tool to its end; its exit status.  It does not outlive an exception here."""
    actions = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (1, 2) if quiet]
    pid = os.posix_spawnp(words[0], words, os.environ, file_actions=actions)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        raise


def start(*words: str, keep: int = 2) -> tuple[int, int]:
    """Start a tool; its pid, and a descriptor with what it says.  It inherits `keep`."""
    read, write = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_DUP2, keep, keep)]
    pid = os.posix_spawnp(words[0], words, os.environ, file_actions=actions)
    os.close(write)
    return pid, read


def end(pid: int) -> None:
    """End a tool that this process has started."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def ask(*words: str) -> str:
    """What a tool says, without space around it; empty where it fails."""
    pid, read = start(*words)
    with open(read, encoding="utf-8", errors="replace") as text:
        said = text.read()
    return "" if os.waitpid(pid, 0)[1] else said.strip()


# -- the domain's end ------------------------------------------------------------------------


@contextlib.contextmanager
def reaped(name: str) -> Iterator[None]:
    """Have the domain `name` destroyed at the end, or when this process is killed."""
    os.makedirs(KNOWN, mode=0o700, exist_ok=True)
    path = os.path.join(KNOWN, name)
    lock = _locked(path)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _reap(name, path, read, lock)
    os.close(read)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.close(write)
        os.waitpid(pid, 0)


def _locked(path: str) -> int:
    """Make a file and hold its lock."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Before it had its lock, a sweep may have taken it for a dead one's.
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)


def _reap(name: str, path: str, read: int, lock: int) -> None:
    """The reaper: wait for the guard's end, destroy the domain."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        kept = sorted((read, lock))
        os.closerange(3, kept[0])
        os.closerange(kept[0] + 1, kept[1])
        os.closerange(kept[1] + 1, 1 << 20)
        os.read(read, 1)
        destroy(name)
        os.unlink(path)
    finally:
        os._exit(0)


def destroy(name: str) -> None:
    """Destroy a domain, if there is one of this name."""
    for _ in range(_DESTROY_ATTEMPTS):
        if run("xl", "destroy", name, quiet=True) == 0 or run("xl", "domid", name, quiet=True):
            return
        time.sleep(0.5)  # it is busy, as one is that is just being made


def sweep() -> None:
    """Destroy domains whose guard and reaper were both killed."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(KNOWN):
            path = os.path.join(KNOWN, name)
            with contextlib.suppress(OSError), open(path, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                destroy(name)
                os.unlink(path)


# -- directories and disks -------------------------------------------------------------------

_CLONE_NEWNS = 0x20000
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _RDONLY = 442, -100, 0x8000, 1


def show_directories(items: Sequence[Item], place: str) -> None:
    """Mount what is shared below `place`, for this process and Xen's QEMU only.

    QEMU has no option of xl's for a read-only directory: the kernel sees to it.
    """
    shared = [item for item in items if item.kind == "share"]
    if not shared:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.unshare(_CLONE_NEWNS), "a mount namespace")
    _checked(libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None), "private mounts")
    for item in shared:
        target = os.path.join(place, item.name)
        os.mkdir(target)
        if not os.path.isdir(item.path):
            target = os.path.join(target, os.path.basename(item.path))
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        source = os.fsencode(os.path.realpath(item.path))
        goal = os.fsencode(target)
        _checked(libc.mount(source, goal, None, _MS_BIND | _MS_REC, None), item.path)
        if not item.writable:
            attributes = struct.pack("=4Q", _RDONLY, 0, 0, 0)
            flags = (_AT_FDCWD, goal, _AT_RECURSIVE, attributes, len(attributes))
            _checked(libc.syscall(_MOUNT_SETATTR, *flags), f"{item.path} read-only")


def _checked(result: int, what: str) -> None:
    if result:
        raise GuardError(f"{what}: {os.strerror(ctypes.get_errno())}")


_LOOP_CTL_GET_FREE, _LOOP_CONFIGURE = 0x4C82, 0x4C0A
_READ_ONLY, _AUTOCLEAR = 1, 4
# struct loop_config: fd, block size, struct loop_info64 with its flags, reserved.
_LOOP_CONFIG = struct.Struct("=II 40x 12xI 176x 64x")
_LOOP_MAJOR = 7


def attach_disks(items: Sequence[Item], place: str, stack: contextlib.ExitStack) -> None:
    """Links to loop devices over the disks' files, which go with the last that has them open."""
    script = os.path.join(place, "attach")
    with open(script, "w", encoding="ascii") as file:
        file.write(_ATTACH)
    os.chmod(script, 0o700)
    with open("/dev/loop-control", "rb") as control:
        for item in items:
            if item.kind == "disk":
                device, held = _loop(item, control.fileno())
                stack.callback(os.close, held)
                os.symlink(device, os.path.join(place, item.name))


def _loop(item: Item, control: int) -> tuple[str, int]:
    """A loop device over the disk's file: its path, and a descriptor that holds it."""
    mode = os.O_RDWR if item.writable else os.O_RDONLY
    file = os.open(item.path, mode | os.O_CLOEXEC)
    flags = _AUTOCLEAR | (0 if item.writable else _READ_ONLY)
    try:
        while True:
            device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            if not os.path.exists(device):
                number = int(device.removeprefix("/dev/loop"))
                os.mknod(device, 0o600 | 0o060000, os.makedev(_LOOP_MAJOR, number))
            held = os.open(device, mode | os.O_CLOEXEC)
            try:
                fcntl.ioctl(held, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, 0, flags))
                return device, held
            except BlockingIOError:
                os.close(held)
            except OSError as error:
                os.close(held)
                if error.errno != 16:  # EBUSY: another was quicker
                    raise
    finally:
        os.close(file)


def create(configuration: str, place: str) -> None:
    """Make the domain; it does not run yet."""
    path = os.path.join(place, "domain.cfg")
    with open(path, "w", encoding="utf-8") as file:
        file.write(configuration)
    # -e: nothing stays behind to wait for its end.
    status = run("xl", "create", "-e", "-p", path)
    if status:
        raise GuardError(f"xl create ended with status {status}")


# -- network ---------------------------------------------------------------------------------

_NO_NETWORK = "-"
_BACK_END = "/sys/bus/xen-backend/drivers/vif"
# A guest with these leaves it to its interface to cut a stream into frames.
_SEGMENTS = ("feature-gso-tcpv4", "feature-gso-tcpv6")


def load_back_end() -> None:
    """Have the kernel's part of guests' networks loaded, which a system with udev has by itself."""
    if not os.path.isdir(_BACK_END) and run("modprobe", "xen-netback", quiet=True):
        raise GuardError("the kernel has no xen-netback for a network (see --network none)")


def attach_network(wire: int, name: str) -> int:
    """Connect a domain that does not run yet to the network helper; pid of what carries frames."""
    number = ask("xl", "domid", name)
    place = f"/local/domain/0/backend/vif/{number}/0"
    if run("xenstore-write", *(word for key in _SEGMENTS for word in (f"{place}/{key}", "0"))):
        raise GuardError("xenstore-write failed")
    program = os.path.join(os.path.dirname(__file__), "xennet.py")
    words = (sys.executable, "-IS", program, str(wire), f"vif{number}.0")
    pid, says = start(*words, keep=wire)
    os.close(wire)
    with open(says, encoding="utf-8") as text:
        if not text.read():
            end(pid)
            raise GuardError("the guest has no network")
    return pid


# -- channel and console ---------------------------------------------------------------------


def connect(launcher: int, name: str, place: str) -> Line:
    """The line of a domain that does not run yet."""
    end = socket.socket(socket.AF_UNIX)
    end.connect(os.path.join(place, "channel"))
    terminal = f"/local/domain/{ask('xl', 'domid', name)}/console/tty"
    # A watch is first told of at once; Xen tells of each domain that ends.
    _, watch = start("xenstore-watch", terminal, "@releaseDomain")
    return Line(launcher, end.detach(), watch, name, terminal)


class Line:
    """The channel between launcher and guest, and the guest's console.

    `watch` is readable when the console may have come to `terminal` (a key of xenstore), or a
    domain has ended.
    """

    def __init__(self, launcher: int, guest: int, watch: int, name: str, terminal: str) -> None:
        self._launcher, self._guest, self._watch = launcher, guest, watch
        self._name, self._terminal = name, terminal
        for fd in (launcher, guest):
            os.set_blocking(fd, False)
        self._console: int | None = None
        self._to_guest = self._to_launcher = b""
        # What is written before the guest has opened its end would be lost.
        self._heard = self._over = False

    def carry(self) -> None:
        """Pass on what comes, to the domain's end or the launcher's."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """Wait for something and do it; False when all is over."""
        wanted = {self._launcher: 0, self._watch: select.POLLIN}
        if self._to_launcher:
            wanted[self._launcher] |= select.POLLOUT
        else:
            wanted[self._guest] = select.POLLIN
        if self._to_guest:
            wanted[self._guest] = wanted.get(self._guest, 0) | select.POLLOUT
        elif self._heard:
            wanted[self._launcher] |= select.POLLIN
        if self._console is not None:
            wanted[self._console] = select.POLLIN
        poll = select.poll()
        for fd, events in wanted.items():
            poll.register(fd, events)
        # Of what the guest has said nothing is dropped, however long a launcher is stopped.
        ready = dict(poll.poll(_QUIET_MS if self._over and not self._to_launcher else None))
        if not ready:
            return False
        if self._watch in ready:
            self._something_happened()
        if self._console is not None and self._console in ready:
            self._pass_console()
        return self._move(ready)

    def _move(self, ready: dict[int, int]) -> bool:
        """Pass on what the channel has and takes; False at either end's end."""
        try:
            if ready.get(self._guest, 0) & ~select.POLLOUT:
                self._to_launcher = os.read(self._guest, 1 << 16)
                self._heard = True
                if not self._to_launcher:
                    return False
            if ready.get(self._launcher, 0) & ~select.POLLOUT:
                self._to_guest = os.read(self._launcher, 1 << 16)
                if not self._to_guest:
                    return False
            if self._to_launcher:
                self._to_launcher = self._to_launcher[os.write(self._launcher, self._to_launcher) :]
            if self._to_guest:
                self._to_guest = self._to_guest[os.write(self._guest, self._to_guest) :]
        except BlockingIOError:
            pass
        except OSError:
            return False  # one end is gone
        return True

    def _something_happened(self) -> None:
        """The console may be there, or a domain has ended, perhaps this one."""
        os.read(self._watch, 1 << 16)
        if self._console is None and (path := ask("xenstore-read", self._terminal)):
            self._console = os.open(path, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
            with contextlib.suppress(termios.error):
                tty.setraw(self._console)
        row = ask("xl", "list", self._name).splitlines()[-1:]
        # Name, number, memory, CPUs, state: of which s, c and d are shut down, crashed, dying.
        self._over = not row or bool(set("scd") & set(row[0].split()[4]))

    def _pass_console(self) -> None:
        assert self._console is not None
        try:
            data = os.read(self._console, 1 << 16)
            while data:
                data = data[os.write(1, data) :]
        except BlockingIOError:
            pass
        except OSError:  # the console's or the launcher's end
            os.close(self._console)
            self._console = None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
