"""Bring an image of a repository into the user's store.

<store>/pulls/<sha256>.lock    held by the one process that fetches that image
<store>/pulls/<sha256>/image   what it has so far; stays after a kill -9 and is resumed
"""

from __future__ import annotations

import errno
import os
import queue
import random
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from apppot.host.common import locks, paths
from apppot.host.common.errors import ApppotError, ImageError, RepositoryError, UsageError
from apppot.host.common.files import PARTIAL
from apppot.host.common.frozen import frozen
from apppot.host.common.progress import Progress
from apppot.host.images import store
from apppot.host.images.probe import probe, require_bootable
from apppot.host.images.record import (
    LATEST,
    Record,
    is_digest,
    split_reference,
    valid_name,
    valid_version,
)
from apppot.host.images.workspace import user_store
from apppot.host.repository import catalogue, chunks, files, keys
from apppot.host.repository.assembly import Assembly
from apppot.host.repository.model import (
    Blob,
    Chunk,
    ChunkMap,
    IndexEntry,
    blob_path,
    decode_map,
)
from apppot.host.repository.remote import Mirrors, Missing, Web

CONNECTIONS = 4
# Short enough that all connections have work to the end, long enough to hide round trips.
SPAN_BYTES = 4 << 20
# Fetching so much that is not needed is cheaper than another request.
GAP_BYTES = 32 << 10
PAUSES = (0.5, 1.0, 2.0)
STALE_SECONDS = 14 * 86400.0
POLL_SECONDS = 0.1
# A server that sends a byte now and then never times out; without a whole chunk for so long it
# counts as gone.
STALL_SECONDS = 300.0


@frozen
class Wanted:
    """What is asked for: an image and the repositories' URLs, the most preferred first."""

    name: str
    version: str
    urls: tuple[str, ...]


@frozen
class Pulled:
    """What a pull did: the image's record and file, the bytes that came over the network, and
    whether it was there before."""

    record: Record
    path: str
    fetched: int = 0
    present: bool = False


def parse(reference: str, urls: Sequence[str]) -> Wanted:
    """[URL/]NAME[:VERSION]; a URL in the reference goes before `urls`.  Raises UsageError."""
    base, slash, word = reference.rpartition("/")
    name, version = split_reference(word)
    if not valid_name(name) or not valid_version(version):
        raise UsageError(f"{reference[:200]!r} is not [URL/]NAME[:VERSION]", "apppot pull --help")
    wanted = [base, *urls] if slash else [*urls]
    if not wanted:
        raise UsageError(
            "no repository is configured",
            "--repository URL, APPPOT_REPOSITORIES, or `repositories` in config.toml",
        )
    return Wanted(name, version, tuple(dict.fromkeys(keys.clean_url(url) for url in wanted)))


def pull(wish: Wanted) -> Pulled:
    """Fetch what is missing of an image and put it into the user's store.

    Safe for any number of processes at once: one fetches, the others wait for it.  Raises
    RepositoryError, ImageError; then the store is as it was and finished chunks are kept.
    """
    web = Web()
    try:
        entry, first = _find(web, wish)
        mirrors = Mirrors(web, [first, *wish.urls])
        present = _present(entry)
        if present is not None:
            return present
        place = os.path.join(user_store(), "pulls", entry.digest)
        notice = f"another process is fetching {entry.name}:{entry.version}; waiting for it"
        started = time.time()
        with files.locked(f"{place}.lock", notice) as waited:
            present = _present(entry)
            if present is not None:
                return present
            if waited:
                files.raise_noted(f"{place}.failure", started)
            done = _fetch_or_note(entry, mirrors, place)
            _sweep(os.path.dirname(place), time.time() - STALE_SECONDS)
            return done
    except OSError as error:
        raise _failure(error, user_store()) from None
    finally:
        web.close()


def _failure(error: OSError, where: str) -> ApppotError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "make room and pull again: what was fetched is kept" if full else ""
    return ImageError(f"writing to {where} failed: {error.strerror or error}", hint)


def copy_out(path: str, target: str) -> None:
    """Copy an image of the store to `target`, which appears whole.  Raises ImageError."""
    partial = f"{target}{PARTIAL}"
    try:
        shutil.copyfile(path, partial)
        os.replace(partial, target)
    except OSError as error:
        raise ImageError(f"{target} cannot be written: {error.strerror}") from None


# --- which image -------------------------------------------------------------------------------


def _find(web: Web, wish: Wanted) -> tuple[IndexEntry, str]:
    """The entry that is asked for and the URL of the repository that has it."""
    failures: list[RepositoryError] = []
    names: set[str] = set()
    for url in wish.urls:
        try:
            index = catalogue.fetch(web, url)
        except Missing as error:
            failures.append(RepositoryError(f"{url} is no repository: {error.cause}"))
            continue
        except RepositoryError as error:
            failures.append(error)
            continue
        entry = index.find(wish.name, wish.version)
        if entry is not None:
            _warn(failures)
            return entry, url
        names |= {f"{entry.name}:{entry.version}" for entry in index.entries}
    if len(failures) == len(wish.urls):
        _warn(failures[:-1])
        raise failures[-1]
    _warn(failures)
    raise _not_there(wish, names)


def _warn(failures: Sequence[RepositoryError]) -> None:
    for failure in failures:
        sys.stderr.write(f"apppot: warning: {failure}\n")


def _not_there(wish: Wanted, names: set[str]) -> RepositoryError:
    import difflib

    reference = wish.name if wish.version == LATEST else f"{wish.name}:{wish.version}"
    words = names | {name.partition(":")[0] for name in names}
    near = difflib.get_close_matches(reference, sorted(words), 3, 0.5) or sorted(names)[:8]
    hint = f"there are: {', '.join(near)}" if near else "it has no images at all"
    return RepositoryError(f"no repository has {reference!r}", hint)


def _present(entry: IndexEntry) -> Pulled | None:
    """The image where a store has it under this name already, or can name it so."""
    for place in paths.image_stores():
        record = store.read_record(place, entry.digest)
        path = store.blob_path(place, record) if record is not None else ""
        if record is None or not _whole(path, entry.size):
            continue
        if place == user_store():
            _tag(place, entry)
            return Pulled(record, path, 0, True)
        if _names(entry, place):
            return Pulled(record, path, 0, True)
    return None


def _whole(path: str, size: int) -> bool:
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


def _names(entry: IndexEntry, place: str) -> bool:
    rows = store.list_images()
    return any(
        (where, record.name, record.version, record.digest)
        == (place, entry.name, entry.version, entry.digest)
        for where, record in rows
    )


def _tag(place: str, entry: IndexEntry) -> None:
    # Only where it changes something: a thousand jobs at once pull what is there.
    for word in (entry.version, LATEST):
        path = os.path.join(place, "names", entry.name, f"{word}.json")
        if files.read_state(path).get("digest") != entry.digest:
            store.tag(place, entry.name, entry.version, entry.digest)
            return


# --- fetching ----------------------------------------------------------------------------------


def _fetch_or_note(entry: IndexEntry, mirrors: Mirrors, place: str) -> Pulled:
    failure = f"{place}.failure"
    try:
        done = _fetch(entry, mirrors, place)
    except RepositoryError as error:
        files.note_failure(failure, error)
        raise
    with suppress(FileNotFoundError):
        os.unlink(failure)
    return done


def _fetch(entry: IndexEntry, mirrors: Mirrors, place: str) -> Pulled:
    image = Blob(entry.digest, entry.size)
    chunk_map = mirrors.checked(
        blob_path("maps", entry.map.digest),
        entry.map.size,
        lambda data: decode_map(data, entry.map, image),
    )
    os.makedirs(place, mode=0o700, exist_ok=True)
    path = os.path.join(place, "image")
    _require_room(path, entry.size)
    with Assembly(path, chunk_map) as assembly:
        assembly.resume()
        _take_local(entry, assembly)
        fetched = _Download(entry, chunk_map, mirrors, assembly).run()
        digest = assembly.digest()
    if digest != entry.digest:
        # Each chunk was right, so the signed map itself is wrong.
        shutil.rmtree(place, ignore_errors=True)
        raise RepositoryError(
            f"{entry.name}:{entry.version} is not what the repository's index says",
            "tell the publisher",
        )
    record = _keep(path, place, entry)
    chunks.write_rows(entry.digest, [(chunk.digest, chunk.length) for chunk in chunk_map.chunks])
    return Pulled(record, store.blob_path(user_store(), record), fetched)


def _keep(path: str, place: str, entry: IndexEntry) -> Record:
    """Into the store, if it is what it claims to be."""
    try:
        probed = probe(path)
        require_bootable(probed, path)
        if probed.format is not entry.format:
            raise ImageError(f"{entry.name} is {probed.format}, not {entry.format} as published")
        record = store.add(path, entry.record(), entry.digest)
    except ImageError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)
    return record


def _require_room(path: str, size: int) -> None:
    try:
        have = os.stat(path).st_blocks * 512
    except FileNotFoundError:
        have = 0
    room = os.statvfs(os.path.dirname(path))
    free = room.f_bavail * room.f_frsize
    if size - have > free:
        raise ImageError(
            f"the image has {size >> 20} MiB, the store's disk {free >> 20} MiB free",
            "make room, or set XDG_DATA_HOME to a larger disk",
        )


def _take_local(entry: IndexEntry, assembly: Assembly) -> None:
    wanted = assembly.missing()
    if not wanted:
        return
    local = chunks.local_chunks(entry.name, entry.parent, entry.size)
    try:
        for chunk in wanted:
            data = local.read(chunk.digest) if chunk.digest in local else None
            if data is not None:
                assembly.put(chunk.digest, data)
    finally:
        local.close()


def _sweep(folder: str, before: float) -> None:
    """Remove what pulls left that nobody has taken up for long."""
    for name in os.listdir(folder):
        place = os.path.join(folder, name)
        if not is_digest(name) or os.stat(place).st_mtime > before:
            continue
        lock = locks.try_acquire(f"{place}.lock")
        if lock is not None:  # nobody is at it
            shutil.rmtree(place, ignore_errors=True)
            os.close(lock)


# --- the network -------------------------------------------------------------------------------


@dataclass
class Span:
    """Chunks that lie close together in one pack, in its order: one request."""

    pack: str
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Where the last chunk ends in the pack."""
        return self.chunks[-1].offset + self.chunks[-1].stored


def plan_spans(wanted: Sequence[Chunk], packs: Sequence[Blob]) -> list[Span]:
    """Requests that fetch `wanted`, in the order of the first chunk that each brings."""
    order = {chunk.digest: number for number, chunk in enumerate(wanted)}
    spans: list[Span] = []
    for chunk in sorted(wanted, key=lambda chunk: (chunk.pack, chunk.offset)):
        pack = packs[chunk.pack].digest
        last = spans[-1] if spans else None
        if (
            last is None
            or last.pack != pack
            or chunk.offset < last.end
            or chunk.offset - last.end > GAP_BYTES
            or chunk.offset + chunk.stored - last.chunks[0].offset > SPAN_BYTES
        ):
            last = Span(pack)
            spans.append(last)
        last.chunks.append(chunk)
    return sorted(spans, key=lambda span: min(order[chunk.digest] for chunk in span.chunks))


class _Download:
    """Fetches what an assembly misses over a few connections."""

    def __init__(
        self, entry: IndexEntry, chunk_map: ChunkMap, mirrors: Mirrors, assembly: Assembly
    ) -> None:
        self._title = f"pulling {entry.name}:{entry.version}"
        self._mirrors = mirrors
        self._assembly = assembly
        wanted = assembly.missing()
        self._total = sum(chunk.stored for chunk in wanted)
        self._spans: queue.SimpleQueue[Span] = queue.SimpleQueue()
        for span in plan_spans(wanted, chunk_map.packs):
            self._spans.put(span)
        self._workers = min(CONNECTIONS, self._spans.qsize())
        self._lock = threading.Lock()
        self._fetched = 0
        self._failure: BaseException | None = None
        self._stop = threading.Event()

    def run(self) -> int:
        """Returns the bytes that were fetched.  Raises RepositoryError, OSError."""
        if not self._workers:
            return 0
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        with Progress(self._title, self._total) as progress:
            for thread in threads:
                thread.start()
            try:
                self._watch(threads, progress)
            finally:
                self._stop.set()
            if self._failure is not None:
                raise self._failure
        return self._fetched

    def _watch(self, threads: Sequence[threading.Thread], progress: Progress) -> None:
        seen, since = -1, time.monotonic()
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(POLL_SECONDS)
            progress.update(self._fetched, f"of {self._total >> 20} MiB")
            if self._fetched != seen:
                seen, since = self._fetched, time.monotonic()
            elif time.monotonic() - since > STALL_SECONDS:
                raise RepositoryError(
                    f"no data for {STALL_SECONDS:.0f} s from {', '.join(self._mirrors.order())}",
                    "pull again later, or from another mirror; what was fetched is kept",
                )

    def _work(self) -> None:
        unpacking = chunks.Unpacking()
        while not self._stop.is_set():
            try:
                self._serve(self._spans.get_nowait(), unpacking)
            except queue.Empty:
                return
            except BaseException as error:
                self._failure = self._failure or error
                self._stop.set()

    def _serve(self, span: Span, unpacking: chunks.Unpacking) -> None:
        """Fetch one span, from mirror after mirror, for as long as that helps."""
        pauses = iter(PAUSES)
        while True:
            failures: dict[str, RepositoryError] = {}
            for url in self._mirrors.order():
                before = len(span.chunks)
                try:
                    return self._from(url, span, unpacking)
                except RepositoryError as error:
                    failures[url] = error
                    self._mirrors.blame(url)
                if self._stop.is_set():
                    return None
                if len(span.chunks) < before:
                    pauses = iter(PAUSES)  # it is alive: as patient as at the start
            pause = next(pauses, None)
            if pause is None:
                raise _all_failed(failures)
            # A thousand jobs that lost one server must not come back all at once.
            self._stop.wait(pause * random.uniform(0.5, 1.5))

    def _from(self, url: str, span: Span, unpacking: chunks.Unpacking) -> None:
        path, at = blob_path("packs", span.pack), span.chunks[0].offset
        with self._mirrors.web.span(f"{url}/{path}", at, span.end) as body:
            while span.chunks and not self._stop.is_set():
                chunk = span.chunks[0]
                body.skip(chunk.offset - at)
                stored = body.read(chunk.stored)
                at = chunk.offset + chunk.stored
                self._write(chunk, unpacking.unpack(stored, chunk.digest, chunk.length))
                span.chunks.pop(0)

    def _write(self, chunk: Chunk, data: bytes) -> None:
        try:
            self._assembly.put(chunk.digest, data)
        except OSError as error:  # the disk's fault, which no other mirror would cure
            raise _failure(error, user_store()) from None
        with self._lock:
            self._fetched += chunk.stored


def _all_failed(failures: dict[str, RepositoryError]) -> RepositoryError:
    reasons = "; ".join(dict.fromkeys(error.cause for error in failures.values()))
    if all(isinstance(error, Missing) for error in failures.values()):
        return RepositoryError(f"the repository has changed: {reasons}", "pull again")
    served = ", ".join(failures)
    return RepositoryError(
        f"the download broke off at {served}: {reasons}",
        "pull again later, or add a mirror with --repository; what was fetched is kept",
    )
