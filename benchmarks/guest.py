"""What a guest costs while it runs: small costs, whole programs, streams, CPU placement."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from apppot.host.process import cpus
from apppot.host.process.run import run

from benchmarks import programs
from benchmarks.machines import HERE, Bench, apppot_run
from benchmarks.measure import Row, interleaved, launch, row

UNITS = {"cpu": "ms", "cpu2": "ms"}
ONE_CPU_CASES = ("syscall", "spawn", "touch", "file", "cpu")


def native_cpus() -> frozenset[int]:
    """One CPU for what runs beside a pinned guest."""
    return frozenset([max(os.sched_getaffinity(0))])


# -- small costs --------------------------------------------------------------------------------


def small_costs(given: Bench) -> list[Row]:
    """System call, spawn, page touch, file and computing, in a guest and on the host."""
    program = given.compiled("micro")
    guest = apppot_run("host", "./micro", *ONE_CPU_CASES, options=("--mem", "512M"))
    subjects: dict[str, Callable[[], Mapping[str, float]]] = {
        "native": lambda: parsed([str(program), *ONE_CPU_CASES], given.folder, native_cpus()),
        "apppot": lambda: parsed(guest, given.folder),
    }
    found = interleaved(subjects, given.rounds(2, 7))
    rows = []
    for case in ONE_CPU_CASES:
        native, ours = found["native"][case], found["apppot"][case]
        unit = UNITS.get(case, "µs")
        rows.append(row("small costs", f"{case}, native", native, unit))
        rows.append(row("small costs", f"{case}, guest", ours, unit, base=native, against="native"))
    return rows


def parsed(argv: list[str], cwd: Path, on: frozenset[int] = frozenset()) -> Mapping[str, float]:
    """What `micro` printed: case -> value."""
    lines = launch(argv, cwd=cwd, cpus=on).output.decode().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines)}


# -- whole programs -----------------------------------------------------------------------------


def whole_programs(given: Bench) -> list[Row]:
    """Programs that people run: native, under proot where it is installed, in a guest."""
    folder = given.folder / "programs"
    folder.mkdir()
    python = programs.find_python()  # the same for host, proot and guest
    cases = programs.make_input(str(folder), python)
    if absent := [case for case in programs.CASES if case not in cases]:
        print(f"not installed, so not measured: {', '.join(absent)}", file=sys.stderr)
    shutil.copy(HERE / "programs.py", folder)
    words = [python, "programs.py", ".", *cases]
    guest = apppot_run("host", *words, options=("--mem", "2G", "--network", "none"))
    commands = {"native": words, "apppot": guest}
    if proot := shutil.which("proot"):
        commands["proot"] = [proot, "-0", *words]
    subjects = {
        name: lambda name=name, argv=argv: measured(
            argv, folder, frozenset() if name == "apppot" else native_cpus()
        )
        for name, argv in commands.items()
    }
    found = interleaved(subjects, given.rounds(1, 5))
    return [
        row("programs", f"{case}, {name}", found[name][case], "s",
            base=None if name == "native" else found["native"][case], against="native")
        for case in cases for name in commands
    ]  # fmt: skip


def measured(argv: list[str], cwd: Path, on: frozenset[int]) -> Mapping[str, float]:
    """What `programs.py` printed: case -> seconds."""
    answer: dict[str, float] = json.loads(launch(argv, cwd=cwd, cpus=on).output)
    return answer


# -- streams ------------------------------------------------------------------------------------


def streams(given: Bench) -> list[Row]:
    """MB/s through a guest's stdin and stdout; a run of `true` is subtracted."""
    size = given.rounds(64, 512) << 20
    data = given.folder / "data"
    with open(data, "wb") as file:
        file.write(os.urandom(1 << 20) * (size >> 20))
    empty = apppot_run("host", "true")
    subjects = {
        "nothing": lambda: {"s": launch(empty, cwd=given.folder).seconds},
        "stdout": lambda: {"s": stdout_to_null(size, given.folder)},
        "stdin, a file": lambda: {"s": stdin_of_file(data, given.folder)},
        "stdin, a pipe": lambda: {"s": stdin_of_pipe(data, given.folder)},
    }
    found = interleaved(subjects, given.rounds(1, 3))
    nothing = statistics.median(found["nothing"]["s"])
    return [
        row("streams", name, [size / 1e6 / max(0.001, s - nothing) for s in values["s"]], "MB/s")
        for name, values in found.items()
        if name != "nothing"
    ]


def stdout_to_null(size: int, folder: Path) -> float:
    """Seconds for a guest that writes `size` bytes."""
    argv = apppot_run("host", "head", "-c", str(size), "/dev/zero")
    begun = time.monotonic()
    run(argv, cwd=folder, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def stdin_of_file(data: Path, folder: Path) -> float:
    """Seconds for a guest that reads all of a file."""
    with open(data, "rb") as file:
        return launch(apppot_run("host", "wc", "-c"), cwd=folder, stdin=file.fileno()).seconds


def stdin_of_pipe(data: Path, folder: Path) -> float:
    """Seconds for a guest that reads all that `cat` writes."""
    begun = time.monotonic()
    with subprocess.Popen(["cat", data], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        launch(apppot_run("host", "wc", "-c"), cwd=folder, stdin=cat.stdout.fileno())
    return time.monotonic() - begun


# -- placement ----------------------------------------------------------------------------------


def placement(given: Bench) -> list[Row]:
    """One and two guest CPUs, pinned and not: what is best for which work."""
    given.compiled("micro")
    cases = ("syscall", "spawn", "touch", "file", "cpu2")
    subjects: dict[str, Callable[[], Mapping[str, float]]] = {
        "1 CPU, pinned": lambda: placed(given, cases, 1, "held"),
        "1 CPU, not pinned": lambda: placed(given, cases, 1, "free"),
        "2 CPUs, not pinned": lambda: placed(given, cases, 2, "free"),
        "2 CPUs, each thread pinned": lambda: placed(given, cases, 2, "threads"),
        "2 CPUs, all on one": lambda: placed(given, cases, 2, "one"),
    }
    if len(os.sched_getaffinity(0)) < 2:
        return []
    found = interleaved(subjects, given.rounds(1, 5))
    base = found["1 CPU, pinned"]
    return [
        row("placement", f"{case}: {name}", values[case], UNITS.get(case, "µs"), base=base[case],
            against="pinned")
        for case in cases for name, values in found.items()
    ]  # fmt: skip


def placed(given: Bench, cases: tuple[str, ...], number: int, how: str) -> Mapping[str, float]:
    """`micro` in a guest of `number` CPUs.  `how`: "held" as the launcher does it, "free" on all
    host CPUs, "threads" each virtual CPU's thread on a CPU of its own, "one" all on one."""
    argv = apppot_run("host", "sh", "-c", f"sleep 0.7; ./micro {' '.join(cases)}",
                      options=("--cpus", str(number), "--network", "none"))  # fmt: skip
    with ExitStack() as stack:
        while how != "held" and (held := cpus.hold()) is not None:
            stack.callback(held.release)  # the launcher finds no CPU free, and does not pin
        if how == "one":
            return parsed(argv, given.folder, native_cpus())
        if how != "threads":
            return parsed(argv, given.folder)
        return _parsed_with_pinned_threads(argv, given.folder)


def _parsed_with_pinned_threads(argv: list[str], folder: Path) -> Mapping[str, float]:
    with subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE) as process:
        time.sleep(0.5)  # the machine is up and its payload asleep
        pin_virtual_cpus(process.pid)
        output, _ = process.communicate(timeout=120)
    return {name: float(value) for name, value in (x.split() for x in output.decode().splitlines())}


def pin_virtual_cpus(launcher: int) -> None:
    """Pin the first thread of the kernel's process (CPU 0) and its second CPU's apart."""
    kernels = [pid for pid in descendants(launcher) if _name(pid) == "kernel"]
    threads = sorted(int(name) for name in os.listdir(f"/proc/{kernels[0]}/task"))
    first, second = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(threads[0], {first})
    # Beside the CPUs there are threads for disks and interrupts, which have next to no work.
    for thread in threads[1:]:
        os.sched_setaffinity(thread, {second})


def descendants(pid: int) -> list[int]:
    """The processes below `pid`, parents first."""
    found, pending = [], [pid]
    while pending:
        parent = pending.pop(0)
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", encoding="ascii") as text:
                    pending += [int(word) for word in text.read().split()]
        except OSError:
            continue
        found.append(parent)
    return found[1:]


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as text:
            return text.read().strip()
    except OSError:
        return ""
