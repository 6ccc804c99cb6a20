"""The metadata service and the posting of outcomes, against a server on loopback."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from apppot.guest.payload import metadata, report, web
from apppot.guest.protocol.job import JobError, Report

from tests.harness.cloud import Cloud, certificate, serving

USER_DATA = {"user-data": b"#!/bin/sh\n", "meta-data/instance-id": b"i-1\n"}
Serve = Callable[..., Cloud]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> object:
    with ExitStack() as stack:

        def start(data: dict[str, bytes], token: int = 200) -> Cloud:
            cloud = stack.enter_context(serving(data, token))
            monkeypatch.setattr(metadata, "SERVICE", ("127.0.0.1", cloud.port))
            return cloud

        monkeypatch.setattr(web, "PAUSES", (0.01, 0.01))
        monkeypatch.setattr(metadata, "_PAUSES", (0.01,))
        yield start


def test_tokens_are_asked_for_and_used(serve: Serve) -> None:
    cloud = serve(USER_DATA)
    answer = metadata.find()
    assert answer is not None
    assert (answer.source, answer.instance, answer.job.script) == ("ec2", "i-1", b"#!/bin/sh\n")
    assert answer.job.hostname == "apppot"
    assert cloud.log[:2] == ["PUT /latest/api/token", "GET /latest/user-data"]


@pytest.mark.parametrize("status", [404, 405])
def test_version_1_is_for_services_that_know_no_tokens(serve: Serve, status: int) -> None:
    serve(USER_DATA, status)
    answer = metadata.find()
    assert answer is not None and answer.instance == "i-1"


def test_a_service_that_is_switched_off_is_asked_nothing_more(serve: Serve) -> None:
    cloud = serve(USER_DATA, 403)
    assert metadata.find() is None
    assert cloud.log == ["PUT /latest/api/token"]


def test_no_user_data_and_no_service_are_no_answer(serve: Serve) -> None:
    with_none = serve({"meta-data/instance-id": b"i-1"})
    assert metadata.find() is None
    assert with_none.log[-1] == "GET /latest/user-data"
    with_none.shutdown()
    with_none.server_close()
    assert metadata.find() is None


def test_a_service_that_fails_is_an_error_and_not_a_local_boot(serve: Serve) -> None:
    cloud = serve(USER_DATA, 500)
    with pytest.raises(web.WebError, match="status 500"):
        metadata.find()
    assert cloud.log == ["PUT /latest/api/token"] * 2


def test_user_data_that_are_no_job_are_an_error(serve: Serve) -> None:
    serve({"user-data": b"#cloud-config\n"})
    with pytest.raises(JobError, match="no job"):
        metadata.find()


def test_what_is_wrong_is_not_asked_again(serve: Serve) -> None:
    cloud = serve({}, 404)
    with pytest.raises(web.WebError, match="/latest/none: status 404"):
        web.patiently("GET", f"http://127.0.0.1:{cloud.port}/latest/none?secret", {})
    assert len(cloud.log) == 1


def test_a_store_that_stays_away_is_told(serve: Serve, tmp_path: Path) -> None:
    cloud = serve({})
    cloud.shutdown()
    cloud.server_close()
    outputs = report.Outputs({"status": 0}, str(tmp_path), {})
    wanted = Report(status=f"http://127.0.0.1:{cloud.port}/run?key=secret")
    (problem,) = report.send(outputs, wanted, None)
    assert f"PUT http://127.0.0.1:{cloud.port}/run: " in problem
    assert "secret" not in problem


def test_outputs_come_before_the_status_and_each_again_until_it_is_taken(
    serve: Serve, tmp_path: Path
) -> None:
    cloud = serve({})
    outputs = report.Outputs({"status": 0}, str(tmp_path), {})
    wanted = Report(put=f"http://127.0.0.1:{cloud.port}/run/", headers={"X-Run": "42"})
    assert report.send(outputs, wanted, None) == []
    names = [line.rpartition("/")[2] for line in cloud.log]
    assert names == ["outputs.tar.gz"] * 2 + ["status.json"] * 2
    data, headers = cloud.stored["/run/outputs.tar.gz"]
    assert headers["X-Run"] == "42" and len(data) == int(headers["Content-Length"])


def test_a_store_must_prove_who_it_is(serve: Serve, tmp_path: Path) -> None:
    known = certificate(tmp_path / "store.pem", "127.0.0.1")
    other = certificate(tmp_path / "other.pem", "127.0.0.1")
    outputs = report.Outputs({"status": 0}, str(tmp_path), {})
    with serving({}, certificate=tmp_path / "store.pem") as cloud:
        url = f"https://127.0.0.1:{cloud.port}/run"
        for wrong, cause in (
            (None, "CERTIFICATE_VERIFY"),
            (other, "CERTIFICATE_VERIFY"),
            ("", "X509"),
        ):
            (problem,) = report.send(outputs, Report(status=url, ca=wrong), None)
            assert f"PUT {url}: " in problem and cause in problem
        assert cloud.log == []
        assert report.send(outputs, Report(status=url, ca=known), None) == []
    assert cloud.log == ["PUT /run"] * 2 and "/run" in cloud.stored
