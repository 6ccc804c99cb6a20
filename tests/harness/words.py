"""Command lines that were explained and those that were executed, made comparable."""

from __future__ import annotations

import re
from collections.abc import Sequence

from apppot.host.machine.preview import RUN_DIRECTORY

# Where a word names a descriptor; a word that is only a number is one, too.
_DESCRIPTOR = re.compile(r"((?:fd[=:]|local\.str=|/fd/)|^)(\d+)(?=$|,)")


def comparable(explained: Sequence[str], executed: Sequence[str]) -> list[str]:
    """`executed` with the run directory and the descriptors of `explained`.

    What differs between them elsewhere stays different.
    """
    place = _run_directory(explained, executed)
    numbers: dict[str, str] = {}
    found = []
    for ours, theirs in zip(explained, executed, strict=False):
        ours_at = [match[2] for match in _DESCRIPTOR.finditer(ours)]
        theirs_at = [match[2] for match in _DESCRIPTOR.finditer(theirs)]
        for number, real in zip(ours_at, theirs_at, strict=False):
            assert numbers.setdefault(real, number) == number, f"{real} stands for two"
        word = _DESCRIPTOR.sub(lambda match: match[1] + numbers.get(match[2], match[2]), theirs)
        # A domain of Xen is called as its run directory is.
        name = place.rpartition("/")[2]
        found.append(word.replace(place, RUN_DIRECTORY).replace(f'"{name}"', f'"{RUN_DIRECTORY}"'))
    assert len(set(numbers.values())) == len(numbers), numbers
    return [*found, *executed[len(found) :]]


def _run_directory(explained: Sequence[str], executed: Sequence[str]) -> str:
    for ours, theirs in zip(explained, executed, strict=False):
        before, here, after = ours.partition(RUN_DIRECTORY)
        if here and theirs.startswith(before) and theirs.endswith(after):
            return theirs[len(before) : len(theirs) - len(after)]
    raise AssertionError("no word names the run directory")
