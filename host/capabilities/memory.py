"""The host's memory: how much a guest can have, and where it may lie."""

from __future__ import annotations

import os
from collections.abc import Mapping

from apppot.host.common.frozen import frozen

# The directory's own free memory is what counts where one is shared with others.
MEMORY_PLACES = ("/dev/shm", "/run/shm", "/tmp")


@frozen
class Memory:
    """Bytes of memory: of the host or of the control group that the caller is in."""

    total: int
    available: int
    limited_by: str
    huge: int = 0  # in free huge pages
    huge_page: int = 1  # bytes of one


def memory() -> Memory:
    """What a guest could have at most, and what is free now."""
    with open("/proc/meminfo", encoding="ascii") as text:
        table = {line.split(":")[0]: int(line.split()[1]) << 10 for line in text}
    huge_page = table.get("Hugepagesize", 0) or 1
    huge = (table.get("HugePages_Free", 0) >> 10) * huge_page  # a number of pages, not of KiB
    total = table["MemTotal"] + table.get("SwapTotal", 0)
    available = table.get("MemAvailable", table["MemFree"]) + table.get("SwapFree", 0)
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        return Memory(limit, min(available, limit), "the control group", huge, huge_page)
    return Memory(total, available, "the host", huge, huge_page)


def _cgroup_limit() -> int | None:
    """The smallest memory limit on the caller's path of control groups (v1 or v2)."""
    limits = []
    try:
        with open("/proc/self/cgroup", encoding="ascii", errors="replace") as text:
            rows = [line.rstrip("\n").split(":", 2) for line in text]
    except OSError:
        return None
    for _, controllers, path in rows:
        if controllers == "":
            base, name = "/sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        while True:
            limits.append(_read_limit(f"{base}{path.rstrip('/')}/{name}"))
            if path in ("/", ""):
                break
            path = os.path.dirname(path)
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def _read_limit(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as text:
            word = text.read().strip()
    except OSError:
        return None
    return int(word) if word.isdigit() and int(word) < 1 << 60 else None


def memory_place(need: int, env: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """Where an unconfined guest's memory file may lie, and what to warn of.

    A memory file system that allows exec and has `need` bytes free; else a disk, with a
    warning; None where nothing serves.
    """
    places = [*MEMORY_PLACES[:2], env.get("XDG_RUNTIME_DIR", ""), env.get("TMPDIR", ""), "/tmp"]
    usable = [place for place in places if place and _serves(place, need)]
    in_memory = [place for place in usable if file_system(place) == "tmpfs"]
    if in_memory:
        return in_memory[0], ""
    if usable:
        return usable[0], f"the guest's memory lies on a disk ({usable[0]}): it will be slow"
    return None, "no place for the guest's memory"


def _serves(place: str, need: int) -> bool:
    try:
        stat = os.statvfs(place)
    except OSError:
        return False
    allows_exec = not stat.f_flag & os.ST_NOEXEC
    return allows_exec and os.access(place, os.W_OK) and stat.f_bavail * stat.f_frsize >= need


def file_system(place: str) -> str:
    """The kind of file system that `place` lies on; "unknown" where the mounts do not say."""
    real, best, kind = os.path.realpath(place), "", "unknown"
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            _, point, fstype = line.split()[:3]
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, fstype
    return kind
