"""Why a guest failed, read from its console's last lines."""

from __future__ import annotations

import re

# (what the console shows, what it means, what helps); the first that matches is told.
_KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        r"ran out of memory on the host side|vm\.max_map_count",
        "the host's vm.max_map_count is too small for this much guest memory",
        "build the pot's kernel, which does not need it (`apppot kernel build`), or ask the "
        "administrator for `sysctl vm.max_map_count=1048576`",
    ),
    (
        r"Unable to mount root fs|VFS: Cannot open root device",
        "the kernel cannot mount the runtime",
        "the kernel lacks ext4 or the pot is damaged: `apppot pot build`",
    ),
    (
        r"Out of memory and no killable processes|System is deadlocked on memory",
        "the guest has too little memory",
        "give it more with --mem",
    ),
    (
        r"No space left on device.*(mem|shm)|ftruncate.*No space|Failed to .*physmem",
        "the host has no room for the guest's memory file",
        "ask for less with --mem, or free memory on the host",
    ),
    (
        r"can't allocate low memory for domain",
        "Xen has not as much memory left",
        "ask for less with --mem; `xl info` says how much is free (free_memory)",
    ),
    (
        r"PROT_EXEC.*not permitted|mmap PROT_EXEC|noexec",
        "the directory for the guest's memory is mounted noexec",
        "set TMPDIR to a memory file system that allows exec, or install bubblewrap",
    ),
    (r"Kernel panic - not syncing: (?P<detail>[^\n]*)", "the guest kernel panicked", ""),
    (r"Segmentation fault|segfault", "the guest kernel crashed", ""),
)


def diagnose(console: str) -> tuple[str, str]:
    """(what happened, what helps) as far as the console tells; empty texts otherwise."""
    for pattern, meaning, remedy in _KNOWN:
        found = re.search(pattern, console)
        if found:
            detail = found.groupdict().get("detail")
            return (f"{meaning}: {detail}" if detail else meaning), remedy
    return "", ""


# What a kernel prints behind a panic: registers and a trace.
_AFTER_PANIC = 60


def last_lines(console: str, count: int = 12) -> list[str]:
    """The console's last lines, without control characters and stack addresses.

    Where the kernel has panicked, from that line on.
    """
    lines = [re.sub(r"[^\x20-\x7e\t]", "", line).rstrip() for line in console.splitlines()]
    lines = [line for line in lines if line and not re.match(r"\s*\[<[0-9a-f]+>\]", line)]
    for number, line in enumerate(lines[-_AFTER_PANIC:]):
        if "Kernel panic" in line:
            start = max(0, len(lines) - _AFTER_PANIC) + number
            return lines[max(0, min(start, len(lines) - count)) :][:count]
    return lines[-count:]
