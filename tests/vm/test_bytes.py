"""What goes in and comes out of a payload is the same, byte for byte."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest

from tests.harness.vm import IMAGE, RELEASE, Launcher, Result, open_pipe

ODD = (
    b"plain", b"with space", b"", b"two\nlines", b"tab\tand 'single' \"double\" quotes",
    b"\\back\\slash", b"$HOME `id` $(id) !! * ? [a-z] {a,b} ~ ; & | < > #", b"\xff\xfe\x80 latin",
    "ünï ☃ 𝄞".encode(), b"-n", b"--", b"--help", b"a=b", b"%s%n", b"\x01\x7f\r", b"x" * 100_000,
)  # fmt: skip


def _nul_separated(result: Result) -> list[bytes]:
    return result.ok().split(b"\0")[:-1]


def test_runs_in_a_guest(apppot: Launcher) -> None:
    assert apppot(IMAGE, "uname", "-r").ok().decode().startswith(RELEASE)


def test_arguments(apppot: Launcher) -> None:
    got = _nul_separated(apppot(IMAGE, "printf", r"%s\0", *ODD))
    assert got == list(ODD)


def test_many_arguments(apppot: Launcher) -> None:
    words = [b"%d %s" % (n, bytes([n % 255 + 1])) for n in range(5000)]
    assert _nul_separated(apppot(IMAGE, "printf", r"%s\0", *words)) == words


def test_options_after_the_image_belong_to_the_command(apppot: Launcher) -> None:
    got = _nul_separated(apppot(IMAGE, "printf", r"%s\0", "--mem", "1M", "-t", "--time=1", "--"))
    assert got == [b"--mem", b"1M", b"-t", b"--time=1", b"--"]


def test_argument_zero_is_as_given(apppot: Launcher) -> None:
    assert apppot.sh(r"cat /proc/$$/cmdline | tr '\0' .").ok().startswith(b"sh.-c.")


def test_environment(apppot: Launcher) -> None:
    given = {
        b"SPACE": b"a b", b"LINES2": b"x\ny", b"BYTES": b"\xff\x80", b"EMPTY": b"", b"EQ": b"a=b=c",
        b"OMP_NUM_THREADS": b"3", b"http_proxy": b"http://proxy:1", b"SLURM_JOB_ID": b"42",
        b"odd-name.1": b"v", b"LC_ALL": b"C.UTF-8", b"QUOTE": b"'\"`$",
    }  # fmt: skip
    result = apppot(IMAGE, "cat", "/proc/self/environ", only_env=given)
    got = dict(item.split(b"=", 1) for item in _nul_separated(result))
    assert {name: got.get(name) for name in given} == given


def test_environment_without_the_host(apppot: Launcher) -> None:
    given = {
        b"LD_LIBRARY_PATH": b"/nowhere", b"PYTHONPATH": b"/nowhere", b"SSH_AUTH_SOCK": b"/x",
        b"XDG_SESSION_ID": b"7", b"DISPLAY": b":0", b"BASH_FUNC_x%%": b"() { :; }",
        b"APPPOT_MEM": b"200M",
    }  # fmt: skip
    result = apppot(IMAGE, "cat", "/proc/self/environ", only_env=given)
    got = dict(item.split(b"=", 1) for item in _nul_separated(result))
    assert not set(given) & set(got)
    assert got[b"PATH"] == b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def test_env_options(apppot: Launcher, place: Path) -> None:
    file = place / "variables"
    file.write_bytes(b"# comment\n\nFROM_FILE=two words\nBYTES=\xff\nBOTH=file\nPASSED\n")
    words = ["--env-file", str(file), "-e", "BOTH=option", "--env", "NEW=a=b", "-e", "ABSENT"]
    result = apppot(
        *words, IMAGE, "cat", "/proc/self/environ", only_env={b"PASSED": b"on", b"ABSENT": b""}
    )
    got = dict(item.split(b"=", 1) for item in _nul_separated(result))
    wanted = {
        b"FROM_FILE": b"two words", b"BYTES": b"\xff", b"BOTH": b"option", b"NEW": b"a=b",
        b"PASSED": b"on", b"ABSENT": b"",
    }  # fmt: skip
    assert {name: got.get(name) for name in wanted} == wanted


def test_env_sets_what_is_not_inherited(apppot: Launcher) -> None:
    words = ["-e", "PATH=/bin:/usr/bin", "-e", "HOME=/tmp", "-e", "LD_LIBRARY_PATH=/opt"]
    got = apppot(*words, IMAGE, "sh", "-c", 'echo "$PATH $HOME $LD_LIBRARY_PATH"').ok()
    assert got == b"/bin:/usr/bin /tmp /opt\n"


def _random_file(path: Path, size: int, seed: int) -> str:
    """A file of `size` random bytes; its SHA-256."""
    block = random.Random(seed).randbytes(1 << 20)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for number in range(-(-size // len(block))):
            piece = (number.to_bytes(8, "big") + block[8:])[: size - number * len(block)]
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


_DIGEST = "uname -r; sha256sum | cut -d' ' -f1"


@pytest.mark.parametrize("size", [1, 8191, 8192, 8193, 65536, 65537, (4 << 20) + 1, 100 << 20])
def test_stdin_from_a_file(apppot: Launcher, place: Path, size: int) -> None:
    digest = _random_file(place / "in", size, seed=size)
    with (place / "in").open("rb") as file:
        release, got = apppot.sh(_DIGEST, stdin=file.fileno()).ok().split()
    assert release.decode().startswith(RELEASE)
    assert got.decode() == digest


def test_stdin_from_a_pipe(apppot: Launcher, place: Path) -> None:
    digest = _random_file(place / "in", 100 << 20, seed=7)
    feeder = subprocess.Popen(["cat", str(place / "in")], stdout=subprocess.PIPE)
    assert feeder.stdout is not None
    with feeder:
        got = apppot.sh(_DIGEST, stdin=feeder.stdout.fileno()).ok().split()[1]
    assert got.decode() == digest


def test_stdin_in_small_and_large_pieces(apppot: Launcher) -> None:
    """Frames and chunk files in turn keep their order."""
    rng = random.Random(11)
    pieces = [
        rng.randbytes(rng.choice([1, 10, 4000, 8192, 9000, 65536, 300_000])) for _ in range(200)
    ]
    running = apppot.start(IMAGE, "sh", "-c", "echo $(uname -r); sha256sum", stdin=subprocess.PIPE)
    assert running.line().decode().startswith(RELEASE)
    assert running.process.stdin is not None
    for piece in pieces:
        running.process.stdin.write(piece)
    running.process.stdin.close()
    running.process.stdin = None
    assert running.finish().ok().split()[0].decode() == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_stdin_starts_where_the_caller_stands(apppot: Launcher, place: Path) -> None:
    (place / "in").write_bytes(b"first line\nrest\n")
    with (place / "in").open("rb", buffering=0) as file:
        file.read(11)
        assert apppot(IMAGE, "cat", stdin=file.fileno()).ok() == b"rest\n"


_WRITER = r"""
use strict; my ($path, $count) = @ARGV;
open(my $in, '<:raw', $path) or die; local $/; my $block = <$in>;
binmode STDOUT; for my $i (0 .. $count - 1) { print pack('N', $i), $block }
"""


def _golden(block: bytes, count: int) -> str:
    digest = hashlib.sha256()
    for number in range(count):
        digest.update(number.to_bytes(4, "big") + block)
    return digest.hexdigest()


def _digest_of(stream: object, digests: dict[str, str], name: str) -> None:
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):  # type: ignore[attr-defined]
        digest.update(piece)
    digests[name] = digest.hexdigest()


@pytest.mark.timeout(240)
def test_one_gigabyte_on_both_outputs(apppot: Launcher) -> None:
    """Two seeded streams at once, neither lost, mixed nor reordered."""
    count = 1024
    blocks = {name: random.Random(name).randbytes((1 << 20) - 4) for name in ("out", "err")}
    for name, block in blocks.items():
        (apppot.work / name).write_bytes(block)
    (apppot.work / "writer.pl").write_text(_WRITER)
    script = f"perl writer.pl out {count} & perl writer.pl err {count} >&2; wait"
    running = apppot.start(IMAGE, "sh", "-c", script)
    digests: dict[str, str] = {}
    threads = [
        threading.Thread(target=_digest_of, args=(running.process.stdout, digests, "out")),
        threading.Thread(target=_digest_of, args=(running.process.stderr, digests, "err")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert running.wait() == 0
    assert digests == {name: _golden(block, count) for name, block in blocks.items()}


def test_order_between_outputs(apppot: Launcher) -> None:
    """Written by turns to one file, as by `2>&1` on the host, turn about."""
    script = "for n in $(seq 200); do echo out $n; echo err $n >&2; sleep 0.002; done; uname -r"
    path = apppot.work / "both"
    with path.open("wb") as file:
        running = apppot.start(
            IMAGE, "sh", "-c", script, stdout=file.fileno(), stderr=file.fileno()
        )
        assert running.wait() == 0
    lines = path.read_text().splitlines()
    assert lines.pop().startswith(RELEASE)
    for kind in ("out", "err"):
        assert [line for line in lines if line.startswith(kind)] == [
            f"{kind} {n}" for n in range(1, 201)
        ]
    assert len(lines) == 400


def test_output_appends_where_the_caller_stands(apppot: Launcher) -> None:
    path = apppot.work / "log"
    with path.open("ab", buffering=0) as file:
        file.write(b"before\n")
        assert apppot.start(IMAGE, "uname", "-r", stdout=file.fileno()).wait() == 0
        file.write(b"after\n")
    first, middle, last = path.read_text().splitlines()
    assert (first, last) == ("before", "after")
    assert middle.startswith(RELEASE)


def test_empty_stdin(apppot: Launcher) -> None:
    assert apppot.sh("wc -c; uname -s", feed=b"").ok() == b"0\nLinux\n"


def test_no_stdin(apppot: Launcher) -> None:
    """-n reads nothing of the caller's stdin, not even what is there."""
    with open_pipe() as (read, write):
        os.write(write, b"for another\n")
        assert apppot("-n", IMAGE, "wc", "-c", stdin=read).ok() == b"0\n"
        assert os.read(read, 100) == b"for another\n"


def test_stdin_that_never_ends(apppot: Launcher) -> None:
    """A payload that does not read is not held by an open stdin."""
    with open_pipe() as (read, _):
        assert apppot(IMAGE, "uname", "-s", stdin=read).ok() == b"Linux\n"


def test_payload_that_closes_its_stdin(apppot: Launcher) -> None:
    feeder = subprocess.Popen(["yes"], stdout=subprocess.PIPE)
    assert feeder.stdout is not None
    with feeder:
        got = apppot.sh("head -c 4; exec <&-; echo; uname -s", stdin=feeder.stdout.fileno()).ok()
        feeder.kill()
    assert got == b"y\ny\n\nLinux\n"


_OPEN = """exec 9> state; for n in 0 1 2; do
    if [ -e /proc/$$/fd/$n ]; then echo $n open >&9; else echo $n closed >&9; fi; done"""


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_descriptor(apppot: Launcher, closed: int) -> None:
    """What is closed for the caller is closed for the payload."""
    script = f"{_OPEN}; uname -r >&9"
    status = apppot.start(IMAGE, "sh", "-c", script, before_exec=lambda: os.close(closed)).wait()
    assert status == 0
    lines = (apppot.work / "state").read_text().splitlines()
    assert lines[:3] == [f"{n} {'closed' if n == closed else 'open'}" for n in range(3)]
    assert lines[3].startswith(RELEASE)


def test_closed_reader_reaches_the_payload(apppot: Launcher) -> None:
    """`apppot run … yes | head -1` ends, with the status of a writer without reader."""
    running = apppot.start(IMAGE, "yes", "a line of many")
    assert running.line() == b"a line of many\n"
    assert running.process.stdout is not None
    running.process.stdout.close()
    running.process.stdout = None
    assert running.wait() == 128 + 13


def test_closed_reader_is_seen_by_a_payload_that_ignores_sigpipe(apppot: Launcher) -> None:
    script = "trap '' PIPE; while echo x; do :; done 2>/dev/null; uname -r > state; exit 7"
    running = apppot.start(IMAGE, "sh", "-c", script)
    running.line()
    assert running.process.stdout is not None
    running.process.stdout.close()
    running.process.stdout = None
    assert running.wait() == 7
    assert (apppot.work / "state").read_text().startswith(RELEASE)


def test_slow_reader_stops_only_its_stream(apppot: Launcher) -> None:
    """While nobody reads stdout, stderr and the heartbeat go on."""
    script = "head -c 30000000 /dev/zero & for n in $(seq 50); do echo $n >&2; done; wait"
    running = apppot.start(IMAGE, "sh", "-c", script)
    assert running.process.stderr is not None
    with os.fdopen(os.dup(running.process.stderr.fileno()), "rb") as lines:
        assert [int(lines.readline()) for _ in range(50)] == list(range(1, 51))
    assert len(running.finish().ok()) == 30_000_000


def test_payload_that_exits_at_once(apppot: Launcher) -> None:
    """The last bytes before the exit are not lost, nor its status, however often."""
    for number in range(20):
        result = apppot.sh(f"printf 'last {number}'; exit {number}")
        assert (result.status, result.out) == (number, b"last %d" % number)


def test_large_last_write(apppot: Launcher) -> None:
    """A pipe full of output is drained after its writer has gone."""
    data = apppot(IMAGE, "head", "-c", "3000000", "/dev/zero").ok()
    assert data == bytes(3_000_000)


def test_ten_thousand_files(apppot: Launcher) -> None:
    """Made on the host and read in the guest, made in the guest and read on the host."""
    rng = random.Random(5)
    contents = [rng.randbytes(rng.randrange(64)) for _ in range(10_000)]
    (apppot.work / "in").mkdir()
    for number, data in enumerate(contents):
        (apppot.work / "in" / f"{number:05}").write_bytes(data)
    copy = r"""
        use strict; mkdir "out"; opendir(my $d, "in") or die;
        my @names = sort grep { /\d/ } readdir $d;
        for my $n (@names) { open(my $i, '<:raw', "in/$n") or die; local $/; my $x = <$i>;
            open(my $o, '>:raw', "out/$n") or die; print $o scalar reverse($x // '') }
        print scalar(@names), "\n"; exec 'uname', '-r';
    """
    count, release = apppot(IMAGE, "perl", "-e", copy).ok().split()
    assert (count, release[:3].decode()) == (b"10000", RELEASE)
    got = [(apppot.work / "out" / f"{number:05}").read_bytes() for number in range(10_000)]
    assert got == [data[::-1] for data in contents]
