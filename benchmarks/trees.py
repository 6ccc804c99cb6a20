"""Trees of files to measure with: the same bytes each time, half text and half noise."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

# Of each mixed tree: this part in LARGE large files, the rest in small ones.
LARGE_PART, LARGE = 0.6, 8
SMALL_BYTES = (200, 60_000)
BLOCK = 1 << 20


def mixed(folder: Path, size: int, seed: int) -> None:
    """About `size` bytes: many small files and a few large ones."""
    chance = random.Random(seed)
    words = _words(chance)
    for number in range(LARGE):
        part = int(size * LARGE_PART / LARGE)
        _write(folder / f"large{number}", part, number % 2 == 0, chance, words)
    left, number = int(size * (1 - LARGE_PART)), 0
    while left > 0:
        part = min(left, chance.randint(*SMALL_BYTES))
        path = folder / f"d{number % 97}" / f"small{number}"
        _write(path, part, number % 2 == 0, chance, words)
        left, number = left - part, number + 1


def packages(folder: Path, files: int, seed: int) -> None:
    """`files` small files in many directories, as Python's site-packages hold them."""
    chance = random.Random(seed)
    words = _words(chance)
    for number in range(files):
        # Sources and their byte code; sizes as in a real site-packages: median 4 KB, some 100 KB.
        size = int(min(200_000, chance.lognormvariate(8.3, 1.2)))
        path = folder / f"package{number // 100}" / f"part{number // 20 % 5}" / f"module{number}.py"
        _write(path, size, number % 4 != 0, chance, words)


def _words(chance: random.Random) -> list[bytes]:
    """4096 words, the frequent ones many times, as in a language (Zipf's law)."""
    letters = b"etaoinshrdlu_"
    words = [bytes(chance.choices(letters, k=chance.randint(1, 12))) + b" " for _ in range(1500)]
    return chance.choices(words, [1 / rank for rank in range(1, len(words) + 1)], k=4096)


def _write(path: Path, size: int, text: bool, chance: random.Random, words: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for block in _blocks(size, text, chance, words):
            file.write(block)


def _blocks(size: int, text: bool, chance: random.Random, words: list[bytes]) -> Iterator[bytes]:
    while size > 0:
        part = min(size, BLOCK)
        if text:
            numbers = memoryview(chance.randbytes(2 * (part // 4 + 1))).cast("H")
            block = b"".join([words[number & 4095] for number in numbers])[:part]
        else:
            block = chance.randbytes(part)
        yield block
        size -= len(block)
