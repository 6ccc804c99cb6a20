"""Whole programs, timed where this runs: on the host, under proot, in a guest.

`python3 programs.py INPUT CASE...` prints one JSON object, case -> seconds.  INPUT is the
directory that `make_input` filled.  Standard library only: any Python 3.9 runs it.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

PYTHONS = ("/usr/local/bin/python3", "/usr/bin/python3")
PLACE = "/dev/shm"  # a tmpfs on both sides: disks are another benchmark


def tool(argv: list[str], cwd: str) -> None:
    """Run a program to its end, output to nowhere; raises where it fails."""
    subprocess.run(argv, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def hmmsearch(given: str, work: str) -> None:
    tool([f"{given}/hmmsearch", "--cpu", "0", f"{given}/model.hmm", f"{given}/sequences.fa"], work)


def numpy_products(given: str, work: str) -> None:
    code = (
        "import numpy; g = numpy.random.default_rng(1); a = g.random((900, 900));"
        "[a @ a for _ in range(3)]; numpy.sort(g.random(3_000_000))"
    )
    tool([sys.executable, "-c", code], work)


def numpy_random_adds(given: str, work: str) -> None:
    code = (
        "import numpy; g = numpy.random.default_rng(1); a = numpy.zeros(25_000_000);"
        "numpy.add.at(a, g.integers(0, a.size, 1_000_000), 1)"
    )
    tool([sys.executable, "-c", code], work)


def gcc(given: str, work: str) -> None:
    for number in range(12):
        tool(["gcc", "-O1", "-c", f"{given}/source.c", "-o", f"{number}.o"], work)


def compileall(given: str, work: str) -> None:
    shutil.copytree(f"{given}/library", f"{work}/library")
    tool([sys.executable, "-m", "compileall", "-qf", "library"], work)


def tar(given: str, work: str) -> None:
    tool(["tar", "-cf", f"{work}/library.tar", "library"], given)
    tool(["tar", "-xf", "library.tar"], work)


def git(given: str, work: str) -> None:
    for number in range(1500):
        with open(f"{work}/file{number}", "w", encoding="ascii") as file:
            file.write(f"file {number}\n" * 20)
    who = ["-c", "user.name=b", "-c", "user.email=b@example.org", "-c", "gc.auto=0"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all"], ["status"]):
        tool(["git", *words], work)


def sqlite(given: str, work: str) -> None:
    database = sqlite3.connect(f"{work}/db")
    database.execute("create table t (a integer primary key, b text)")
    with database:
        database.executemany("insert into t values (?, ?)", ((i, "x" * 20) for i in range(100_000)))
    for number in range(150):
        with database:
            database.execute("update t set b = ? where a = ?", ("y", number * 600))
    database.close()


def spawn_loop(given: str, work: str) -> None:
    for _ in range(300):
        subprocess.run(["/bin/true"], check=True)


def shell_pipes(given: str, work: str) -> None:
    tool(["sh", "-c", "i=0; while [ $i -lt 400 ]; do echo $i | cat; i=$((i+1)); done"], work)


CASES: dict[str, Callable[[str, str], None]] = {
    "hmmsearch": hmmsearch,
    "numpy products": numpy_products,
    "numpy random adds": numpy_random_adds,
    "gcc -O1, 12 files": gcc,
    "python compileall": compileall,
    "tar out and in": tar,
    "git, 1,500 files": git,
    "sqlite": sqlite,
    "300 spawns": spawn_loop,
    "400 shell pipes": shell_pipes,
}


def seconds(case: str, given: str) -> float:
    """How long `case` takes, in a fresh directory."""
    with tempfile.TemporaryDirectory(dir=PLACE, prefix="bench-") as work:
        start = time.monotonic()
        CASES[case](given, work)
        return time.monotonic() - start


def main() -> None:
    given = os.path.abspath(sys.argv[1])
    print(json.dumps({case: seconds(case, given) for case in sys.argv[2:]}))


def make_input(given: str, python: str) -> list[str]:
    """Fill `given` with what the cases read; returns those that this machine has the tools for.

    `python` is the interpreter that will run the cases.
    """
    shutil.copytree(os.path.dirname(json.__file__), f"{given}/library/json")
    for package in ("email", "http", "asyncio", "unittest", "xml"):
        source = os.path.join(os.path.dirname(os.__file__), package)
        shutil.copytree(source, f"{given}/library/{package}", dirs_exist_ok=True)
    _make_source(f"{given}/source.c")
    absent = set()
    if not _make_hmmer(given):
        absent.add("hmmsearch")
    if not _has_numpy(python):
        absent |= {"numpy products", "numpy random adds"}
    for program in ("gcc", "tar", "git"):
        if shutil.which(program) is None:
            absent |= {case for case in CASES if case.startswith(program)}
    return [case for case in CASES if case not in absent]


def find_python() -> str:
    """The system's interpreter, which a guest sees as well; one with NumPy if there is one."""
    found = [path for path in PYTHONS if os.access(path, os.X_OK)]
    return next((path for path in found if _has_numpy(path)), found[-1])


def _has_numpy(python: str) -> bool:
    return subprocess.run([python, "-c", "import numpy"], capture_output=True).returncode == 0


def _make_source(path: str) -> None:
    loop = "for (int i = 0; i < a; i++) s += i * {0} ^ s;"
    function = "int f{0}(int a) {{ int s = {0}; " + loop + " return s; }}\n"
    with open(path, "w", encoding="ascii") as file:
        file.write("#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n")
        file.writelines(function.format(number) for number in range(60))


def _make_hmmer(given: str) -> bool:
    """HMMER's tutorial: a profile of globins, and its 45 sequences 400 times over (18,000)."""
    programs = [shutil.which(name) for name in ("hmmbuild", "hmmsearch")]
    if None in programs:
        return False
    build, search = (str(program) for program in programs)
    share = os.path.dirname(os.path.dirname(build)) + "/share/doc/hmmer/examples/tutorial"
    alignment, sequences = f"{share}/globins4.sto", f"{share}/globins45.fa"
    if not (os.path.exists(alignment) and os.path.exists(sequences)):
        return False
    shutil.copy(search, f"{given}/hmmsearch")
    tool([build, f"{given}/model.hmm", alignment], given)
    with open(sequences, encoding="ascii") as file:
        text = file.read()
    with open(f"{given}/sequences.fa", "w", encoding="ascii") as file:
        file.write(text * 400)
    return True


if __name__ == "__main__":
    main()
