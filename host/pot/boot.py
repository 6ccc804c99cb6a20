"""Short boots of a kernel: does it start, and how many loops are there to a jiffy."""

from __future__ import annotations

import os
import shutil
import tempfile

from apppot.host.capabilities.capabilities import QEMU
from apppot.host.common.errors import BuildError
from apppot.host.pot.layout import Kernel, lpj_for, parse_lpj, remember_lpj
from apppot.host.process.run import run

BOOT_SECONDS = 60.0
CALIBRATIONS = 4
MEMORY = "mem=128M"
NO_ROOT = "Unable to mount root"


def boot_console(path: str, *words: str) -> str:
    """What a kernel prints on its way to a root file system that it does not find.

    The panic ends it (User-Mode Linux exits on panic).  Raises ToolError where it hangs.
    """
    with tempfile.TemporaryDirectory(prefix="apppot-boot-") as folder:
        argv = [path, MEMORY, "root=none", "con=null", "con0=null,fd:1", f"uml_dir={folder}/"]
        cpu = min(os.sched_getaffinity(0))
        pinned = ["taskset", "-c", str(cpu), *argv, *words]
        done = run(pinned, check=False, timeout=BOOT_SECONDS, hint="apt-get install util-linux")
    return (done.stdout + done.stderr).decode(errors="replace")


def measure_lpj(kernel: Kernel) -> int | None:
    """Calibrate once for this kernel on this machine, and remember it; None: it did not say."""
    known = lpj_for(kernel)
    if known is not None:
        return known
    words = seccomp_words(kernel)
    boots = [parse_lpj(boot_console(kernel.path, *words)) for _ in range(CALIBRATIONS)]
    # A busy host only ever makes a calibration too low.
    value = max((lpj for lpj in boots if lpj is not None), default=None)
    if value is not None:
        remember_lpj(kernel.digest, value)
    return value


def seccomp_words(kernel: Kernel) -> list[str]:
    """The kernel's faster way to run its processes, where it knows it."""
    return ["seccomp=auto"] if "seccomp" in kernel.features else []


def check_boots(kernel: Kernel) -> None:
    """Raise BuildError unless the kernel boots as far as looking for its root."""
    console = boot_console(kernel.path, *seccomp_words(kernel))
    if NO_ROOT not in console:
        hint = "is /dev/shm (or $TMPDIR) mounted with exec and has it 128 MiB free?"
        raise BuildError(f"the kernel does not boot; it said last\n    {_tail(console)}", hint)


def check_boots_in_qemu(vmlinux: str) -> None:
    """Raise BuildError unless QEMU boots the kernel as far as looking for its root.

    Without QEMU that is not tried, and said.  The processor is emulated: KVM may be there and
    not work, and this is about the kernel.
    """
    if shutil.which(QEMU) is None:
        print(f"apppot: {QEMU} is not installed; the x86-64 kernel was not tried")
        return
    argv = [QEMU, "-M", "microvm,accel=tcg,pit=on,pic=on,rtc=on", "-cpu", "max", "-m", "256"]
    argv += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    argv += ["-no-reboot", "-kernel", vmlinux, "-append"]
    words = "console=ttyS0 root=none panic=-1 reboot=t tsc_early_khz=1000000 no_timer_check"
    done = run([*argv, words], check=False, timeout=BOOT_SECONDS)
    console = (done.stdout + done.stderr).decode(errors="replace")
    if NO_ROOT not in console:
        cause = f"the x86-64 kernel does not boot in QEMU; it said last\n    {_tail(console)}"
        raise BuildError(cause)


def _tail(console: str) -> str:
    return "\n    ".join(console.strip().splitlines()[-5:])
