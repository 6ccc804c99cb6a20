"""The lab's results as a table: scenarios down, hypervisors across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tests.scenarios.runner import Result

_WIDTH = 16


@dataclass(frozen=True)
class Column:
    """What one lab gave.  `checked` is what a guest without AppPot saw there; `failure` says why
    there are no results, or what is wrong beside them; `seconds` is what all of it took."""

    hypervisor: str
    checked: str
    failure: str
    results: tuple[Result, ...]
    seconds: float

    def passed(self) -> bool:
        """Whether the suite ran and every scenario was as it must be."""
        if self.failure:
            return False
        return bool(self.results) and not any(result.problem for result in self.results)

    def fields(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed()}


def table(columns: Sequence[Column]) -> str:
    """The table, with below it what went wrong and what the guests said of themselves."""
    names = list(dict.fromkeys(result.name for column in columns for result in column.results))
    width = max([len(name) for name in names], default=8)
    lines = [" ".join([f"{'':{width}}", *(f"{c.hypervisor:>{_WIDTH}}" for c in columns)])]
    for name in names:
        cells = [_cell(name, column) for column in columns]
        lines.append(" ".join([f"{name:{width}}", *(f"{cell:>{_WIDTH}}" for cell in cells)]))
    for column in columns:
        lines += ["", *_notes(column)]
    return "\n".join(lines) + "\n"


def _cell(name: str, column: Column) -> str:
    for result in column.results:
        if result.name == name:
            return f"{'FAIL' if result.problem else 'pass'} {result.seconds:7.1f} s"
    return "-"


def _notes(column: Column) -> list[str]:
    right = sum(not result.problem for result in column.results)
    verdict = column.failure or f"{right} of {len(column.results)} scenarios as they must be"
    lines = [f"{column.hypervisor}: {verdict} ({column.seconds:.0f} s)"]
    if column.checked:
        lines.append(f"  a guest without AppPot: {column.checked}")
    for evidence in sorted({result.evidence for result in column.results}):
        lines.append(f"  seen from inside: {evidence}")
    for result in column.results:
        if result.problem:
            lines.append(f"  {result.name}:")
            lines += [f"    | {line}" for line in result.problem.splitlines()]
    return lines
