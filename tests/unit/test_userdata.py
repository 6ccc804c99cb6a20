"""User data and the labels of config drives, as clouds and people write them."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

import pytest
from apppot.guest.payload import configdrive, userdata
from apppot.guest.protocol.job import Job, JobError, Report

SCRIPT = b"#!/bin/sh\necho \xff\n"
PLAIN = {
    "apppot": 1,
    "command": ["prog", "ä b"],
    "env": {"A": "b"},
    "workdir": "/tmp",
    "outputs": ["*.dat", "**/log"],
    "hostname": "node",
    "report": {"put": "https://store.example/run/"},
}


def parsed(data: bytes) -> Job:
    job = userdata.parse(data)
    assert job is not None
    return job


@pytest.mark.parametrize(
    "pack",
    [
        lambda data: data,
        gzip.compress,
        base64.b64encode,
        base64.encodebytes,
        lambda data: base64.b64encode(gzip.compress(data)),
    ],
)
def test_a_script_comes_as_it_is(pack: object) -> None:
    assert callable(pack)
    assert parsed(pack(SCRIPT)).script == SCRIPT


def test_a_description_is_either_ours_or_in_plain_words() -> None:
    job = Job(argv=[b"\xff"], outputs=[b"\xfe*"], report=Report(status="http://x"))
    assert parsed(job.dump()) == job
    plain = parsed(json.dumps(PLAIN).encode())
    assert plain.argv == [b"prog", "ä b".encode()]
    assert (plain.env, plain.cwd, plain.hostname) == ({b"A": b"b"}, b"/tmp", "node")
    assert plain.outputs == [b"*.dat", b"**/log"]
    assert plain.report is not None
    assert plain.report.status_url() == "https://store.example/run/status.json"
    assert plain.report.outputs_url() == "https://store.example/run/outputs.tar.gz"


def test_a_command_of_one_text_is_the_shells() -> None:
    assert parsed(b'{"apppot": 1, "command": "a | b"}').argv == [b"/bin/sh", b"-c", b"a | b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"#cloud-config\npackages: [a]\n", "cloud-config.*no job"),
        (b"Content-Type: multipart/mixed\n\n", "no job"),
        (b"{", "not JSON"),
        (b'{"argv": []}', "not a job description"),
        (b'{"apppot": 1, "comand": "x"}', "unknown word 'comand'"),
        (b'{"apppot": 1, "command": [1]}', "no text"),
        (b'{"apppot": 1, "env": []}', "env cannot be"),
        (b'{"apppot": 1, "report": {"url": "x"}}', "unknown field 'url'"),
        (b"\x1f\x8bdamaged", "damaged"),
        (b"abc", "base64"),
    ],
)
def test_what_is_no_job_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(JobError, match=message):
        userdata.parse(data)


@pytest.mark.parametrize("data", [b"", b" \n", gzip.compress(b"", mtime=0)])
def test_empty_user_data_are_no_answer(data: bytes) -> None:
    assert userdata.parse(data) is None


def test_labels_are_read_from_superblocks(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    iso = bytearray(18 * 2048)
    iso[16 * 2048 : 16 * 2048 + 6] = b"\x01CD001"
    iso[16 * 2048 + 40 : 16 * 2048 + 72] = b"CIDATA".ljust(32)
    fat16, fat32 = bytearray(20 * 2048), bytearray(20 * 2048)
    fat16[54:59], fat16[43:54] = b"FAT16", b"config-2   "
    fat32[82:87], fat32[71:82] = b"FAT32", b"cidata     "
    for data, wanted in (
        (iso, ("cidata", "iso9660")),
        (fat16, ("config-2", "vfat")),
        (fat32, ("cidata", "vfat")),
        (bytes(64 << 10), ("", "")),
        (b"short", ("", "")),
    ):
        disk.write_bytes(data)
        assert configdrive.label(str(disk)) == wanted
    assert configdrive.label(str(tmp_path / "missing")) == ("", "")


def test_a_machines_metadata_are_yaml_lines_or_json() -> None:
    lines = b'# a cloud\'s\ninstance-id: i-1\nlocal-hostname: "node.site"\nkeys:\n  - a: b\n'
    assert configdrive.facts(lines) == {
        "instance-id": "i-1",
        "local-hostname": "node.site",
        "keys": "",
    }
    assert configdrive.facts(b'{"uuid": "u", "devices": []}') == {"uuid": "u"}


def test_a_cloud_names_the_machine_unless_the_job_does() -> None:
    job, named = Job(), Job(hostname="mine")
    configdrive.Answer("x", job, hostname="node.site.example")
    configdrive.Answer("x", named, hostname="node.site.example")
    assert (job.hostname, named.hostname) == ("node", "mine")
