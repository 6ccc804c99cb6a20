"""The job description and the drive that carries it."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from apppot.guest.protocol import drive, jsonlite
from apppot.guest.protocol.job import Job, JobError, Layer, Mount, Network
from hypothesis import given
from hypothesis import strategies as st

BYTES = st.binary(max_size=60)
LAYERS = st.builds(
    Layer,
    source=BYTES,
    fstype=st.sampled_from(["ext4", "squashfs"]),
    offset=st.integers(0, 1 << 40),
)
MOUNTS = st.builds(Mount, source=BYTES, target=BYTES, read_only=st.booleans(), name=BYTES)
JOBS = st.builds(
    Job,
    argv=st.lists(BYTES, max_size=5),
    env=st.dictionaries(BYTES, BYTES, max_size=5),
    cwd=st.none() | BYTES,
    uid=st.integers(0, 1 << 31),
    umask=st.none() | st.integers(0, 0o777),
    rlimits=st.dictionaries(
        st.just("NOFILE"), st.lists(st.integers(-1, 99), min_size=2, max_size=2)
    ),
    tty=st.booleans(),
    closed=st.lists(st.integers(0, 2)),
    layers=st.lists(LAYERS, max_size=3),
    mounts=st.lists(MOUNTS, max_size=3),
    network=st.none() | st.just(Network()),
    hostname=st.text(max_size=20),
    localtime=st.none() | BYTES,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(JOBS)
def test_round_trip(job: Job) -> None:
    assert Job.load(job.dump()) == job


@given(JOBS)
def test_is_json(job: Job) -> None:
    assert json.loads(job.dump())["version"] == 1


@given(JSON)
def test_own_json_is_json(value: Any) -> None:
    assert json.loads(jsonlite.dumps(value)) == value
    assert jsonlite.loads(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["", "{", "[1,]", "{} x", "nul", '"\x01"', "{'a': 1}"])
def test_malformed_json(text: str) -> None:
    with pytest.raises(ValueError):
        jsonlite.loads(text)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b'{"version": 2}', b'{"version": 1, "argv": 5}', b"\xff",
        b'{"version": 1, "argv": ["A"]}', b'{"version": 1, "no_such": 1}',
        b'{"version": 1, "env": [["QQ=="]]}', b'{"version": 1, "layers": [{"no_such": 1}]}',
    ],
)  # fmt: skip
def test_malformed(data: bytes) -> None:
    with pytest.raises(JobError):
        Job.load(data)


def test_unknown_field() -> None:
    with pytest.raises(JobError):
        Job(arguments=[])


def test_defaults_are_not_shared() -> None:
    one, other = Job(), Job()
    one.argv.append(b"x")
    one.env[b"A"] = b"B"
    assert (other.argv, other.env) == ([], {})


@given(st.binary(max_size=3000))
def test_drive_round_trip(job: bytes) -> None:
    path = Path(f"/dev/shm/apppot-drive-{os.getpid()}")
    try:
        path.write_bytes(drive.pack(job))
        assert drive.read_job(str(path)) == job
    finally:
        path.unlink(missing_ok=True)


def test_drive_is_a_tar() -> None:
    with tarfile.open(fileobj=io.BytesIO(drive.pack(b"the job"))) as archive:
        (member,) = archive.getmembers()
        assert (member.name, member.mode) == ("apppot/job.json", 0o600)
        file = archive.extractfile(member)
        assert file is not None
        assert file.read() == b"the job"


def test_drive_of_whole_blocks() -> None:
    assert [len(drive.pack(bytes(size))) % 512 for size in (0, 1, 511, 512, 513)] == [0] * 5


@given(st.integers(0, 511), st.integers(1, 255))
def test_damaged_header(tmp_path_factory: pytest.TempPathFactory, at: int, change: int) -> None:
    data = bytearray(drive.pack(b"job"))
    data[at] ^= change
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        assert drive.read_job(str(path)) == b"job"
    except drive.DriveError:
        pass


@pytest.mark.parametrize("size", [0, 100, 512, 514])
def test_short_drive(tmp_path: Path, size: int) -> None:
    (tmp_path / "drive").write_bytes(drive.pack(b"a job of some bytes")[:size])
    with pytest.raises(drive.DriveError):
        drive.read_job(str(tmp_path / "drive"))
