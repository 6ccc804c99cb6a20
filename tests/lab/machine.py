"""The lab as a machine: starts QEMU, gives orders, passes on what they write."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from apppot.host.process.run import run

from tests.lab.image import ROOT, Parts

QEMU = "qemu-system-x86_64"
MEMORY = 3584  # MB; pages that nobody touches cost nothing
DOM0_MEMORY = 1200
EXCHANGE = "exchange"
# The variable with how many processors the KVM lab has, for measurements.
PROCESSORS = "LAB_PROCESSORS"
# The variable, not empty, that has Xen's lab not count instructions.
OWN_PACE = "LAB_OWN_PACE"
# Where the console of a lab that failed is kept.
KEPT = ROOT / "build" / "lab"


class LabError(RuntimeError):
    """The lab did not do as ordered; the message has the end of its console."""


class Kind(StrEnum):
    """What guests of the lab run on, as the scenario suite calls it."""

    KVM = "kvm"
    XEN = "xen"
    XEN_PVH = "xen-pvh"

    @property
    def boots(self) -> Kind:
        """What the lab is booted as: one Xen has both types of guests."""
        return Kind.XEN if self is Kind.XEN_PVH else self

    def processor(self) -> str:
        """Models with SVM and nested paging on which both levels boot."""
        match self:
            case Kind.KVM:
                # XSAVE as emulated does not agree with what it says of itself: a guest kernel that
                # looks closely gives up.  What programs use with it goes too.
                return "EPYC-Rome,+svm,+npt,-xsave,-avx,-avx2,-fma,-f16c,-pclmulqdq"
            case Kind.XEN | Kind.XEN_PVH:
                # Its dom0 does not survive SMAP as QEMU 7.2 emulates it, nor a PVH guest RDTSCP.
                # Without XSAVE, User-Mode Linux does not run in this dom0.
                return "qemu64,+svm,+npt"

    def timing(self) -> tuple[str, ...]:
        """How many processors, and what their clock is."""
        match self:
            case Kind.KVM:
                # Not counted: leaving the processor's loop when a count is up, QEMU 7.2
                # delivers once more what KVM has just injected, now with interrupts off, and the
                # guest's kernel waits for a lock of its own for ever.  Nor more than one for tests:
                # processors that order each other to do things leave that loop as well.
                return ("-accel", "tcg,thread=multi", "-smp", os.environ.get(PROCESSORS, "1"))
            case Kind.XEN | Kind.XEN_PVH:
                if os.environ.get(OWN_PACE):
                    return ("-accel", "tcg,thread=multi", "-smp", "1")
                # A second is a number of instructions, whatever else the machine does: all time
                # limits in the lab, those of Xen's tools too, are those of an idle machine.
                # Without it, one unlucky first measurement of the processor's clock made Xen's
                # seconds a hundred times too long.  But it hides races: see boots.sh.
                return ("-accel", "tcg,thread=single", "-icount", "shift=1", "-smp", "1")

    def kernel(self, parts: Parts) -> list[str]:
        # Without mitigations: nobody is to be protected, and emulated they are slow.
        console = "quiet loglevel=3 panic=-1 mitigations=off"
        match self:
            case Kind.KVM:
                words = ["-kernel", str(parts.kernel), "-initrd", str(parts.initramfs)]
                return [*words, "-append", f"console=ttyS0 {console}"]
            case Kind.XEN | Kind.XEN_PVH:
                options = (
                    "console=com1 com1=115200 loglvl=warning bootscrub=0 spec-ctrl=no xpti=no "
                    f"dom0_mem={DOM0_MEMORY}M,max:{DOM0_MEMORY}M dom0_max_vcpus=1"
                )
                modules = f"{parts.kernel} console=hvc0 {console},{parts.initramfs}"
                return ["-kernel", str(parts.xen), "-append", options, "-initrd", modules]


def argv(kind: Kind, parts: Parts, place: Path, shares: Mapping[str, Path]) -> list[str]:
    """QEMU's command line.

    `place` has the sockets and the console's log.  `shares` are directories of the host,
    read-only but for the one that is named exchange.
    """
    # Nothing may be left of a lab whose driver was killed.
    words = ["setpriv", "--pdeathsig", "KILL", QEMU, "-M", "q35", "-cpu", kind.processor()]
    words += [*kind.timing(), "-m", str(MEMORY), "-nodefaults", "-display", "none", "-no-reboot"]
    words += ["-serial", f"file:{place}/console.log", *kind.kernel(parts)]
    words += ["-drive", f"file={parts.disk},file.locking=off,if=virtio,format=raw,readonly=on"]
    words += ["-device", "virtio-serial"]
    for name in ("control", "output"):
        # It waits for us, since a port that nobody listens to reads as ended in the lab.
        words += ["-chardev", f"socket,id={name},path={place}/{name},server=on,wait=on"]
        words += ["-device", f"virtserialport,chardev={name},name=lab.{name}"]
    for tag, path in shares.items():
        options = f"local,path={path},mount_tag={tag},security_model=none,multidevs=remap"
        words += ["-virtfs", options if tag == EXCHANGE else f"{options},readonly=on"]
    words += ["-qmp", f"unix:{place}/qmp,server=on,wait=off"]
    return words


def fingerprint(kind: Kind, parts: Parts, shares: Mapping[str, Path]) -> str:
    """What a saved state fits: the same machine in the same QEMU, whatever it is shown."""
    words = argv(kind, parts, Path("/"), dict.fromkeys([*sorted(shares), EXCHANGE], Path("/")))
    version = run([QEMU, "--version"]).stdout.decode()
    return hashlib.sha256("\0".join([*words, version]).encode()).hexdigest()[:16]


class Lab:
    """A lab that runs.  A context manager: its end is QEMU's.

    It boots, or goes on from the file `saved`, and must be up within `limit` seconds.
    """

    def __init__(
        self,
        kind: Kind,
        parts: Parts,
        shares: Mapping[str, Path],
        *,
        limit: float,
        saved: Path | None = None,
    ) -> None:
        self.kind = kind
        self.place = Path(tempfile.mkdtemp(prefix="lab-"))
        self.exchange = self.place / EXCHANGE
        self.exchange.mkdir()
        self._deadline = time.monotonic() + limit
        self._saved = saved
        command = argv(kind, parts, self.place, {**shares, EXCHANGE: self.exchange})
        if saved is not None:
            command += ["-incoming", f"exec:cat {saved}"]
        with open(self.place / "qemu.log", "wb") as log:
            self._qemu = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._orders = 0
        self._lines = b""

    def __enter__(self) -> Lab:
        try:
            self._control = self._connect("control")
            self._output = self._connect("output")
            if self._saved is None:
                word = self._answer(self._deadline, lambda _: None).split()[0]
                assert word == "up", word
            else:
                self._await(lambda: self._monitor("query-status")["status"] != "inmigrate")
                self._monitor("cont")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            KEPT.mkdir(parents=True, exist_ok=True)
            (KEPT / f"{self.kind}-console.log").write_text(self.console(lines=None))
        self.close()

    def close(self) -> None:
        """End it.  Whatever it was about to do, nothing of it is lost that anybody wants."""
        self._qemu.kill()
        self._qemu.wait()
        shutil.rmtree(self.place, ignore_errors=True)

    def save(self, target: Path) -> None:
        """Write the state of a lab that has had no orders yet, and end it."""
        temporary = target.with_name(f"{target.name}.{os.getpid()}")
        self._monitor("stop")
        self._monitor("migrate", uri=f"exec:cat >{temporary}")
        self._await(lambda: self._monitor("query-migrate")["status"] in ("completed", "failed"))
        if self._monitor("query-migrate")["status"] == "failed":
            raise LabError(f"the {self.kind} lab's state cannot be saved")
        self.close()
        temporary.rename(target)

    def run(self, script: str, limit: float, take: Callable[[bytes], object] | None = None) -> int:
        """Run a script for the lab's shell; its exit status.

        What it writes is given to `take` as it comes, by default to stdout.  Raises LabError
        where it takes longer than `limit` seconds or the lab dies.
        """
        self._orders += 1
        name = f"order{self._orders}"
        (self.exchange / name).write_text(script)
        order = f"{self.kind.boots} {time.time():.0f} /lab/{EXCHANGE}/{name}\n"
        self._control.sendall(order.encode())
        word, status = self._answer(time.monotonic() + limit, take or _to_stdout).split()
        assert word == "status", word
        return int(status)

    def _connect(self, name: str) -> socket.socket:
        end = socket.socket(socket.AF_UNIX)

        def connected() -> bool:
            try:
                end.connect(str(self.place / name))
            except OSError:
                return False
            return True

        self._await(connected)
        return end

    def _await(self, condition: Callable[[], bool]) -> None:
        """Wait for what sends no event."""
        while not condition():
            if self._qemu.poll() is not None or time.monotonic() > self._deadline:
                raise LabError(f"QEMU does not start the {self.kind} lab\n{self.console()}")
            time.sleep(0.02)

    def _monitor(self, command: str, **arguments: object) -> dict[str, Any]:
        """Let QEMU's monitor execute a command; what it returns."""
        with self._connect("qmp") as end, end.makefile("rw") as lines:
            lines.readline()
            for word, values in (("qmp_capabilities", {}), (command, arguments)):
                lines.write(json.dumps({"execute": word, "arguments": values}) + "\n")
                lines.flush()
                answer: dict[str, Any] = {"event": ""}
                while "event" in answer:
                    answer = json.loads(lines.readline())
        if "return" not in answer:
            raise LabError(f"{command}: {answer}")
        returned: dict[str, Any] = answer["return"]
        return returned

    def _answer(self, deadline: float, take: Callable[[bytes], object]) -> str:
        """The next line from the lab; its output until then is taken."""
        while b"\n" not in self._lines:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._control, self._output], [], [], max(0, left))
            if not ready:
                raise LabError(f"the {self.kind} lab took too long\n{self.console()}")
            for end in ready:
                data = end.recv(65536)
                if not data:
                    raise LabError(f"the {self.kind} lab died\n{self.console()}")
                if end is self._output:
                    take(data)
                else:
                    self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        # What was written before the status was sent has arrived, perhaps unread.
        with contextlib.suppress(BlockingIOError):
            while data := self._output.recv(65536, socket.MSG_DONTWAIT):
                take(data)
        return line.decode()

    def console(self, lines: int | None = 40) -> str:
        """The end of what QEMU said and of the lab's console; all of it for None."""
        said: list[str] = []
        for name in ("qemu.log", "console.log"):
            with contextlib.suppress(OSError):
                text = (self.place / name).read_text(errors="replace")
                kept = [
                    line for line in text.splitlines() if "doesn't support requested" not in line
                ]
                said += kept if lines is None else kept[-lines:]
        return "\n".join(said)


def _to_stdout(data: bytes) -> None:
    os.write(sys.stdout.fileno(), data)
