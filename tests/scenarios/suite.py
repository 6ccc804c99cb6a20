"""The suite's text: scenarios, each with the transcript that every hypervisor must give."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SUITE = Path(__file__).parent / "suite.txt"
_SECTION = re.compile(
    rb"^(?:=== (?P<name>.+)|--- (?P<part>status (?P<status>\d+)|stdout|stderr))\n"
)


@dataclass(frozen=True)
class Transcript:
    """What is seen of a scenario from outside."""

    status: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class Scenario:
    """A script for the host's shell and its golden transcript."""

    name: str
    script: bytes
    golden: Transcript


def load(path: Path = SUITE) -> tuple[Scenario, ...]:
    """The scenarios of a suite in their order.  Raises ValueError for what is no suite."""
    return parse(path.read_bytes())


def parse(text: bytes) -> tuple[Scenario, ...]:
    scenarios: list[Scenario] = []
    parts: dict[str, bytes] = {}
    name, current = "", ""
    for number, line in enumerate([*text.splitlines(keepends=True), b"=== \0\n"], 1):
        match = _SECTION.match(line)
        if match is None:
            if name:
                parts[current] += line
            elif line.strip() and not line.startswith(b"#"):
                raise ValueError(f"line {number} belongs to no scenario")
        elif match["name"] is not None:
            if name:
                scenarios.append(_scenario(name, parts))
            name, parts, current = match["name"].decode(), {"script": b""}, "script"
        else:
            current = "status" if match["status"] else match["part"].decode()
            if not name or current in parts:
                raise ValueError(f"line {number}: a part in the wrong place")
            parts[current] = match["status"] or b""
    names = [scenario.name for scenario in scenarios]
    if len(set(names)) < len(names):
        raise ValueError("two scenarios have the same name")
    return tuple(scenarios)


def _scenario(name: str, parts: dict[str, bytes]) -> Scenario:
    if "status" not in parts:
        raise ValueError(f"{name}: which status?")
    # Blank lines between scenarios belong to nothing: no transcript ends with one.
    texts = {part: text.rstrip(b"\n") + b"\n" for part, text in parts.items() if text.strip()}
    golden = Transcript(int(texts["status"]), texts.get("stdout", b""), texts.get("stderr", b""))
    return Scenario(name, texts["script"], golden)


def write(transcript: Transcript) -> str:
    """A transcript as it stands in the suite."""
    lines = [f"--- status {transcript.status}"]
    for part, data in (("stdout", transcript.stdout), ("stderr", transcript.stderr)):
        if data:
            lines += [f"--- {part}", data.decode(errors="backslashreplace").rstrip("\n")]
    return "\n".join(lines) + "\n"
