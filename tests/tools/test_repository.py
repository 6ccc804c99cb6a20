"""Publish and pull over a real web server on loopback, with all that can go wrong there."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apppot.host.common.errors import ApppotError, ImageError, RepositoryError
from apppot.host.common.files import file_digest
from apppot.host.images import store
from apppot.host.images.importing import importer
from apppot.host.images.record import Image, Record
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import user_store, workspace
from apppot.host.repository import catalogue, keys, publish, pull
from apppot.host.repository.publish import Publication

from tests.harness.webserver import Server, serving

MEGABYTE = 1 << 20
MAIN = "from apppot.host.cli import main; main()"


def home(path: Path, patch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "DATA", "CACHE"):
        patch.setenv(f"XDG_{name}_HOME", str(path / name.lower()))


@pytest.fixture(autouse=True)
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image in a repository, and this process at home at the publisher's."""
    monkeypatch.setenv("APPPOT_SITE_STORE", str(tmp_path / "site"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pull, "PAUSES", (0.05, 0.1))
    home(tmp_path / "publisher", monkeypatch)
    keys.create()
    return tmp_path / "repo"


@pytest.fixture
def server(publisher: Path) -> Iterator[Server]:
    publisher.mkdir()
    with serving(publisher) as running:
        yield running


def image(seed: int, size: int = 8 * MEGABYTE) -> bytes:
    """Something that passes for squashfs: incompressible, with a compressible part."""
    head = bytearray(96)
    head[:4], head[20], head[28] = b"hsqs", 6, 4
    head[40:48] = size.to_bytes(8, "little")
    noise = random.Random(seed).randbytes(size - 96 - size // 8)
    return bytes(head) + noise + b"inodes!?" * (size // 64)


def add(name: str, version: str, content: bytes, **more: Any) -> Record:
    with workspace() as folder:
        path = os.path.join(folder, "image")
        Path(path).write_bytes(content)
        record = Record("", name, version, "squashfs", 0, command=("true", "x y"), **more)
        return store.add(path, record)


def offer(repo: Path, *images: str, **more: Any) -> publish.Published:
    return publish.publish(str(repo), Publication(images=images, **more), ["default"])


def user(tmp_path: Path, patch: pytest.MonkeyPatch, *urls: str, name: str = "user") -> None:
    """Become a user who trusts the publisher at `urls`."""
    public = keys.own_keys()[0].public if keys.own_keys() else keys.pins()[0].key
    home(tmp_path / name, patch)
    for url in urls:
        keys.trust(public, url)


def get(reference: str, *urls: str) -> pull.Pulled:
    return pull.pull(pull.parse(reference, urls))


def content(done: pull.Pulled) -> bytes:
    return Path(done.path).read_bytes()


def untouched() -> bool:
    """Whether the store has no image and nothing half-made is visible."""
    return store.list_images() == []


# --- what works --------------------------------------------------------------------------------


def test_an_image_arrives_with_all_that_is_known_of_it(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = add("base", "1", image(1), env={"A": "b"}, description="d", user="root", workdir="/w")
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    done = get("base", server.url)
    assert done.record == sent
    assert content(done) == image(1)
    assert done.fetched < len(image(1)) * 0.9  # the compressible eighth
    assert resolve("base:1").digest == resolve("base").digest == sent.digest
    assert os.listdir(tmp_path / "user/data/apppot/images/pulls") == [f"{sent.digest}.lock"]
    again = get("base:1", server.url)
    assert again.present and again.fetched == 0


def test_an_update_costs_its_difference(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = image(1)
    new = old[: 3 * MEGABYTE] + b"x" * 1000 + image(2)[:100_000] + old[3 * MEGABYTE :]
    add("base", "1", old)
    add("base", "2", new)
    offer(server.root, "base:1", "base:2")
    user(tmp_path, monkeypatch, server.url)
    get("base:1", server.url)
    server.sent = 0
    done = get("base:2", server.url)
    assert content(done) == new
    assert done.fetched < 400_000 and server.sent < 500_000


def system(path: Path, updated: str = "") -> Path:
    """A tar of 25 packages, 25 MB; one of them `updated`: other bytes, times and a file more."""
    with tarfile.open(path, "w") as archive:
        for package in (f"package{number}" for number in range(25)):
            new = package == updated
            chance = random.Random(f"{package} {new}")
            for number in range(21 if new else 20):
                size = 400_000 if number < 2 else chance.randrange(22_000)
                member = tarfile.TarInfo(f"usr/lib/{package}/file{number}")
                member.size, member.mtime = size, 1_700_000_000 + new
                data = chance.randbytes(size // 2) + bytes(size - size // 2)
                archive.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo("bin/sh")
        member.size, member.mode = 4, 0o755
        archive.addfile(member, io.BytesIO(b"#!sh"))
    return path


def test_one_packages_update_costs_little(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a real squashfs image, where files share blocks and all that follows moves."""
    importer.import_file(str(system(tmp_path / "old.tar")), "base:1")
    importer.import_file(str(system(tmp_path / "new.tar", "package7")), "base:2")
    offer(server.root, "base:1", "base:2")
    user(tmp_path, monkeypatch, server.url)
    get("base:1", server.url)
    done = get("base:2", server.url)
    assert file_digest(done.path) == done.record.digest
    # The package is 4 % of the files.
    assert done.record.size // 50 < done.fetched < done.record.size * 15 // 100


def test_chunks_of_an_image_that_was_never_pulled_serve_too(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    add("mine", "7", image(1)[: 6 * MEGABYTE] + b"other")
    done = get("base", server.url)
    assert content(done) == image(1) and done.fetched < 1.5 * MEGABYTE


def test_the_site_store_serves_chunks_and_images(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    (tmp_path / "site").mkdir()
    os.rename(user_store(), tmp_path / "site" / "images")
    user(tmp_path, monkeypatch, server.url)
    assert get("base", server.url).present
    assert not os.path.exists(user_store())


@pytest.mark.parametrize("ranges", [True, False])
def test_any_web_server_will_do(
    tmp_path: Path, publisher: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    add("base", "1", image(1))
    offer(publisher, "base:1")
    with serving(publisher, ranges) as server:
        user(tmp_path, monkeypatch, server.url)
        assert content(get("base", server.url)) == image(1)


def test_repeated_chunks_come_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = image(1, MEGABYTE)
    add("zeros", "1", body + bytes(64 * MEGABYTE) + body)
    assert offer(server.root, "zeros:1").written < 2 * MEGABYTE
    user(tmp_path, monkeypatch, server.url)
    done = get("zeros", server.url)
    assert content(done) == body + bytes(64 * MEGABYTE) + body
    assert done.fetched < 2 * MEGABYTE
    assert os.stat(done.path).st_blocks * 512 < 8 * MEGABYTE  # a hole stays a hole


def test_the_command_line(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    done = apppot("pull", f"{server.url}/base:1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == resolve("base").digest
    monkeypatch.setenv("APPPOT_REPOSITORIES", server.url)
    copied = apppot("pull", "base", "-o", str(tmp_path / "copy"))
    assert copied.returncode == 0 and "was here already" in copied.stdout
    assert (tmp_path / "copy").read_bytes() == image(1)
    wrong = apppot("pull", "bose")
    assert wrong.returncode == 125 and "base" in wrong.stderr and wrong.stderr.count("\n") == 2


def apppot(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, *words], capture_output=True, text=True, timeout=60
    )


def test_changes_come_with_their_base_named(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apppot.host.images.changes import record as changes

    base = add("base", "1", image(1, MEGABYTE))
    file = tmp_path / "dev.changes"
    file.write_bytes(image(3, MEGABYTE))
    changes.seal(str(file), changes.Changes(base.digest, "base:1", "2026-01-01T00:00:00Z"))
    offer(server.root, changes=[f"dev:3={file}"])
    user(tmp_path, monkeypatch, server.url)
    done = get("dev:3", server.url)
    assert content(done) == file.read_bytes()
    assert done.record.parent == base.digest


# --- trust -------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_and_named(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    public = keys.own_keys()[0].public
    user(tmp_path, monkeypatch)
    with pytest.raises(RepositoryError, match="not trusted") as caught:
        get("base", server.url)
    assert f"apppot key trust {public} --repository {server.url}" in caught.value.hint
    assert untouched()


def test_a_changed_index_is_refused(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    for path in [server.root / "index.json", *(server.root / "indexes").rglob("?" * 64)]:
        path.write_bytes(path.read_bytes().replace(b'"true"', b'"evil"'))
    user(tmp_path, monkeypatch, server.url)
    with pytest.raises(RepositoryError, match="not the one that was signed"):
        get("base", server.url)
    signature = json.loads((server.root / "index.json.sig").read_text())
    from apppot.host.repository.model import digest_of

    signature["index"] = digest_of((server.root / "index.json").read_bytes())
    (server.root / "index.json.sig").write_text(json.dumps(signature))
    with pytest.raises(RepositoryError, match="changed after it was signed"):
        get("base", server.url)
    assert untouched()


def test_an_older_index_is_refused_until_the_user_says_otherwise(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    add("base", "2", image(2))
    offer(server.root, "base:1")
    names = ("index.json", "index.json.sig")
    old = {name: (server.root / name).read_bytes() for name in names}
    offer(server.root, "base:2")
    user(tmp_path, monkeypatch, server.url)
    assert get("base", server.url).record.version == "2"
    for name in names:
        (server.root / name).write_bytes(old[name])
    with pytest.raises(RepositoryError, match="older than it was: serial 1 after 2"):
        get("base:1", server.url)
    catalogue.forget(server.url)
    assert get("base:1", server.url).record.version == "1"


def test_another_repository_of_the_same_key_is_no_stand_in(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    other = tmp_path / "other"
    offer(other, "base:1")
    user(tmp_path, monkeypatch, server.url)
    get("base", server.url)
    server.root = other
    with pytest.raises(RepositoryError, match="another repository"):
        get("base", server.url)


def test_a_reader_in_the_middle_of_a_publish(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signature is new, the convenient copy of the index is not: killed just between."""
    add("base", "1", image(1))
    add("base", "2", image(2))
    offer(server.root, "base:1")
    stale = (server.root / "index.json").read_bytes()
    offer(server.root, "base:2")
    (server.root / "index.json").write_bytes(stale)
    user(tmp_path, monkeypatch, server.url)
    assert get("base", server.url).record.version == "2"


def test_pulls_while_somebody_publishes(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        add("base", str(number), image(number, MEGABYTE))
    offer(server.root, "base:0")
    public = keys.own_keys()[0].public
    code = (
        "import sys\nfrom apppot.host.repository.publish import Publication, publish\n"
        "for n in range(1, 12): publish(sys.argv[1], Publication(['base:%d' % n]), ['default'])"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(server.root)], stderr=-3)
    home(tmp_path / "user", monkeypatch)
    keys.trust(public)
    seen = set()
    while writer.poll() is None:
        done = get("base", server.url)
        seen.add(done.record.version)
        assert content(done) == image(int(done.record.version), MEGABYTE)
    assert writer.returncode == 0 and len(seen) > 1


# --- trouble on the way ------------------------------------------------------------------------


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("folder", ["packs", "maps"])
def test_a_corrupted_file_is_refused_and_another_mirror_helps(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    server.fault = lambda path, data: flip(data) if folder in path else data
    with serving(server.root) as good:
        user(tmp_path, monkeypatch, server.url, good.url)
        with pytest.raises(RepositoryError, match="corrupted"):
            get("base", server.url)
        assert untouched()
        assert content(get("base", server.url, good.url)) == image(1)
        assert good.count("index.json") == 0  # the first mirror's index was sound


def test_a_server_that_hangs_up_in_the_middle(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each answer is cut in half: progress all the same, chunk by chunk."""
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    server.fault = lambda path, data: data[: max(150_000, len(data) // 2)]
    assert content(get("base", server.url)) == image(1)


def test_a_server_that_vanishes_and_comes_back(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    budget = [4 * MEGABYTE]

    def vanish(path: str, data: bytes) -> bytes | None:
        if "packs" in path:
            budget[0] -= len(data)
            return data[: max(0, len(data) + budget[0])] if budget[0] < 0 else data
        return data

    server.fault = vanish
    with pytest.raises(RepositoryError, match="broke off") as caught:
        get("base", server.url)
    assert "kept" in caught.value.hint and untouched()
    server.fault = None
    done = get("base", server.url)
    assert content(done) == image(1)
    assert done.fetched < 5 * MEGABYTE


def test_a_mirror_that_dies_in_mid_download(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    with serving(server.root) as second:
        user(tmp_path, monkeypatch, server.url, second.url)
        server.fault = lambda path, data: data[: len(data) // 3] if "packs" in path else data
        assert content(get("base", server.url, second.url)) == image(1)
        assert second.sent < 7 * MEGABYTE  # what the first had sent is not fetched again


@pytest.mark.parametrize("urls", [["http://127.0.0.1:9"], ["http://127.0.0.1:9", "GOOD"]])
def test_a_server_that_is_not_there(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, urls: list[str]
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    known = [url.replace("GOOD", server.url) for url in urls]
    if server.url in known:
        assert content(get("base", *known)) == image(1)
    else:
        with pytest.raises(RepositoryError, match="refused"):
            get("base", *known)


def test_a_server_that_stalls_is_given_up(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    monkeypatch.setattr(pull, "STALL_SECONDS", 0.5)

    def stall(path: str, data: bytes) -> bytes:
        time.sleep(5 if "packs" in path else 0)
        return data

    server.fault = stall
    started = time.monotonic()
    with pytest.raises(RepositoryError, match="no data for"):
        get("base", server.url)
    assert time.monotonic() - started < 4
    assert untouched()


def test_an_endless_index_is_cut_off(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    user(tmp_path, monkeypatch, server.url)
    with open(server.root / "index.json.sig", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RepositoryError, match="absurdly large"):
        get("base", server.url)
    assert server.sent < 16 * MEGABYTE


def test_a_signed_lie_about_the_format_is_found_out(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", b"no file system at all" * 100_000)
    offer_blindly(server.root, monkeypatch)
    user(tmp_path, monkeypatch, server.url)
    with pytest.raises(ImageError):
        get("base", server.url)
    assert untouched()
    assert not list((tmp_path / "user/data/apppot/images/pulls").rglob("image"))


def offer_blindly(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish what an honest publisher's tool would refuse to."""
    from apppot.host.images.probe import ImageFormat, Probed

    found = store.list_images()[0]
    path = store.blob_path(*found)
    sham = Probed(ImageFormat.SQUASHFS, found[1].size)
    fake = Image(path, ImageFormat.SQUASHFS, found[1].digest, found[1], sham)
    with monkeypatch.context() as context:
        context.setattr(publish, "resolve", lambda reference: fake)
        offer(repo, "base:1")


def test_no_room_is_said_before_the_download(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    real = os.statvfs(tmp_path)
    small = os.statvfs_result((*real[:4], 1, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    with pytest.raises(ApppotError, match="free"):
        get("base", server.url)
    assert server.count("packs") == 0


# --- many, and killed --------------------------------------------------------------------------


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAIN, *words], stdout=-1, stderr=-1, text=True)


@pytest.mark.timeout(240)
def test_of_many_pullers_one_downloads(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    results: list[pull.Pulled] = []
    threads = [
        threading.Thread(target=lambda: results.append(get("base", server.url))) for _ in range(200)
    ]
    processes = [start("pull", f"{server.url}/base") for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(results) == 200
    assert sum(not done.present for done in results) <= 1
    assert server.count("maps") == 1
    assert server.count("index.json.sig") < 60  # those who waited took what the first found
    assert server.sent < 9 * MEGABYTE
    assert content(results[0]) == image(1)


@pytest.mark.timeout(240)
def test_killed_again_and_again_it_arrives(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1, 24 * MEGABYTE))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)

    def slow(path: str, data: bytes) -> bytes:
        time.sleep(0.4 if "packs" in path else 0)
        return data

    server.fault = slow
    for delay in (0.5, 0.7, 0.9, 1.1):
        process = start("pull", f"{server.url}/base")
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        for _, record in store.list_images():
            assert file_digest(resolve("base").path) == record.digest
    server.fault, server.sent = None, 0
    done = get("base", server.url)
    assert content(done) == image(1, 24 * MEGABYTE)


def test_finished_chunks_survive_a_kill(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    partial = tmp_path / "user/data/apppot/images/pulls" / record.digest / "image"
    partial.parent.mkdir(parents=True)
    whole = image(1)
    partial.write_bytes(
        whole[: 3 * MEGABYTE] + b"torn" * (MEGABYTE // 4) + whole[4 * MEGABYTE : -MEGABYTE]
    )
    done = get("base", server.url)
    assert content(done) == whole
    assert done.fetched < 2.5 * MEGABYTE


@pytest.mark.timeout(240)
def test_a_publish_that_is_killed_leaves_a_working_repository(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1, MEGABYTE))
    offer(server.root, "base:1")
    for number in range(2, 6):
        add("base", str(number), image(number, 24 * MEGABYTE))
        process = start("publish", str(server.root), f"base:{number}")
        time.sleep(0.15 * number)
        process.kill()
        process.communicate()
    public = keys.own_keys()[0].public
    home(tmp_path / "user", monkeypatch)
    keys.trust(public)
    number = int(get("base", server.url).record.version)
    assert content(get("base", server.url)) == image(number, (1 if number == 1 else 24) * MEGABYTE)
    home(tmp_path / "publisher", monkeypatch)
    offer(server.root, "base:5", prune=True)
    assert not list(server.root.rglob(".*.partial"))
    home(tmp_path / "user", monkeypatch)
    assert content(get("base:5", server.url)) == image(5, 24 * MEGABYTE)


def test_those_who_wait_for_a_dead_server_fail_together(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    add("base", "1", image(1))
    offer(server.root, "base:1")
    user(tmp_path, monkeypatch, server.url)
    monkeypatch.setattr(pull, "PAUSES", (1.0,))

    def dead(path: str, data: bytes) -> bytes | None:
        return None if "packs" in path else data

    server.fault = dead
    failures: list[ApppotError] = []

    def attempt() -> None:
        try:
            get("base", server.url)
        except RepositoryError as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 50
    assert len({error.cause for error in failures}) == 1
    assert server.count("packs") < 20
