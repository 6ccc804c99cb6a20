"""What the benchmarks start: the launcher, bare kernels, and the files that they need."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from apppot.host.pot.layout import Kernel, find_kernel, lpj_for, stock_kernel
from apppot.host.process.run import run

HERE = Path(__file__).resolve().parent
APPPOT = str(Path(sys.executable).with_name("apppot"))
IMAGE = "debian-12"


@dataclass(frozen=True)
class Bench:
    """One run of the benchmarks: how thorough, and a directory for its files."""

    full: bool
    folder: Path

    def rounds(self, quick: int, full: int) -> int:
        """How many repetitions."""
        return full if self.full else quick

    def compiled(self, name: str) -> Path:
        """The static program of `name`.c, compiled on first use."""
        program = self.folder / name
        if not program.exists():
            source = HERE / f"{name}.c"
            run(["gcc", "-O1", "-static", "-o", program, source], hint="apt-get install gcc")
        return program


@contextmanager
def bench(full: bool) -> Iterator[Bench]:
    """A Bench whose files vanish afterwards."""
    with tempfile.TemporaryDirectory(prefix="apppot-bench-") as folder:
        yield Bench(full, Path(folder))


def apppot_run(image: str, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    """The launcher's command line; a job directory is the current one."""
    return [APPPOT, "run", *options, image, *command]


def bare_kernel(kernel: Kernel, root: Path, scratch: Path, memory: str = "512M") -> list[str]:
    """A kernel's own command line, with the directory `root` as root and /init in it."""
    words = [kernel.path, f"mem={memory}", "rootfstype=hostfs", f"rootflags={root}", "rw"]
    words += ["init=/init", "con=null", "con0=null,fd:2", "ssl=null", f"uml_dir={scratch}/"]
    if "seccomp" in kernel.features:
        words.append("seccomp=on")
    lpj = lpj_for(kernel)
    if lpj is not None:
        words.append(f"lpj={lpj}")
    return words


def stock() -> Kernel | None:
    """Debian's stock User-Mode Linux kernel, where it is installed."""
    path = stock_kernel()
    return None if path is None else find_kernel(kernel=path)


def floor_root(given: Bench) -> Path:
    """A root directory whose /init only powers off."""
    root = given.folder / "floor-root"
    if not root.exists():
        for name in ("dev", "proc", "sys"):
            (root / name).mkdir(parents=True)
        (root / "init").hardlink_to(given.compiled("floor"))
    return root
