"""The guest's one wrapper for the pot's own tools (mke2fs, resize2fs, mkfs.erofs) and helpers."""

from __future__ import annotations

import os


def run(path: str, *arguments: str, **env: str) -> None:
    """Run a tool to its end, stdin and stdout being /dev/null, with `env` and PATH set.

    Raises OSError with the last of what it said on stderr when it fails.
    """
    name = os.path.basename(path)
    read, write = os.pipe()
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    moves = [(null, 0), (null, 1), (write, 2)]
    pid = os.posix_spawn(
        path,
        [name, *arguments],
        {"PATH": "/usr/sbin:/usr/bin", **env},
        file_actions=[(os.POSIX_SPAWN_DUP2, *move) for move in moves],
    )
    os.close(write)
    os.close(null)
    said = b""
    while piece := os.read(read, 4096):
        said = (said + piece)[-2000:]
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        text = " ".join(said.decode("utf-8", "replace").split())
        raise OSError(f"{name} failed (status {os.waitstatus_to_exitcode(status)}): {text}")


def start(words: list[str], output: int) -> None:
    """Start a helper that writes to `output`; it lives until the agent ends all processes."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    moves = [(null, 0), (output, 1)]
    actions = [(os.POSIX_SPAWN_DUP2, *move) for move in moves]
    os.posix_spawn(words[0], words, {"PATH": "/usr/sbin:/usr/bin"}, file_actions=actions)
    os.close(null)
