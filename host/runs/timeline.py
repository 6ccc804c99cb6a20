"""Where the time of a run went: launcher, kernel, agent, payload, as numbers or as a picture."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from xml.sax.saxutils import escape

from apppot.host.common.errors import UsageError
from apppot.host.common.frozen import frozen
from apppot.host.machine.failure import describe
from apppot.host.machine.run import Run


@frozen
class Step:
    """One step: `lane` is who worked; times in seconds since the launcher's start."""

    lane: str
    name: str
    start: float
    end: float


def steps(record: Run, started: float) -> list[Step]:
    """The run's steps in order.

    The guest's clock counts from power-on; it is laid on the host's by the HELLO, which one side
    sent at about the moment at which the other received it.
    """
    assert record.outcome is not None
    host = {name: at - started for name, at in [*record.marks, *record.outcome.marks]}
    found = [
        Step("launcher", "plan", 0.0, host["planned"]),
        Step("launcher", "start", host["planned"], host["hypervisor"]),
    ]
    hello = record.outcome.hello
    found += _guest_steps(hello["timeline"], host["hypervisor"], host["hello"])
    if hello.get("resumed"):
        found[2] = replace(found[2], name="resume")
    found.append(Step("launcher", "handshake", host["hello"], host["go"]))
    if "payload" in host:
        found.append(Step("guest", "start of the payload", host["go"], host["payload"]))
        ended = host.get("payload ended", host["exit"])
        found.append(Step("payload", "payload", host["payload"], ended))
        if "payload ended" in host:
            found.append(Step("guest", "outputs", ended, host["exit"]))
    found.append(Step("launcher", "clean up", host["exit"], host["cleaned up"]))
    return found


def _guest_steps(marks: list[list[object]], begun: float, hello: float) -> list[Step]:
    times = [(str(name), float(str(at))) for name, at in marks]
    offset = hello - times[-1][1]
    found = [Step("kernel", "kernel", begun, max(begun, offset + times[0][1]))]
    for (_, before), (name, at) in zip(times, times[1:], strict=False):
        found.append(Step("agent", name, offset + before, offset + at))
    return found


def as_json(record: Run, found: list[Step], status: int) -> dict[str, object]:
    """The report of a run for scripts; times in seconds."""
    assert record.outcome is not None
    report = record.outcome.report
    return {
        **describe(record),
        "exit_code": status,
        "timed_out": record.outcome.timed_out,
        "user_seconds": report.get("user"),
        "system_seconds": report.get("system"),
        "max_rss_kib": report.get("maxrss"),
        "release": record.outcome.hello.get("release"),
        "timeline": [[step.lane, step.name, step.start, step.end] for step in found],
    }


def print_json(record: Run, found: list[Step], status: int) -> None:
    """The report on stderr: stdout belongs to the payload."""
    sys.stderr.write(json.dumps(as_json(record, found, status)) + "\n")


_COLOURS = {
    "launcher": "#4477aa",
    "kernel": "#ee6677",
    "agent": "#ccbb44",
    "guest": "#66ccee",
    "payload": "#228833",
}
_WIDTH, _ROW, _LEFT, _TOP = 640, 20, 170, 46


def write(found: list[Step], path: str) -> None:
    """Write the timeline as a picture (.svg) or as JSON (.json)."""
    if path.endswith(".svg"):
        text = svg(found)
    elif path.endswith(".json"):
        text = json.dumps([[step.lane, step.name, step.start, step.end] for step in found])
    else:
        raise UsageError(f"--timeline {path}: unknown kind of file", "name it .svg or .json")
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"--timeline {path}: {error.strerror}") from error


def read(path: str) -> list[Step]:
    """The steps in a JSON file that `write` made.  Raises UsageError."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
        return [Step(str(lane), str(name), float(a), float(b)) for lane, name, a, b in rows]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path} is no timeline: {error}", "apppot run --timeline FILE.json …"
        ) from error


_TEXT_WIDTH = 40


def text(found: list[Step]) -> str:
    """The steps as lines with bars, times in milliseconds; those below 0.5 ms are left out."""
    total = max(step.end for step in found) or 1.0
    lines = [f"{'':10}{'':26}{'at ms':>8}{'took':>8}"]
    for step in found:
        took = step.end - step.start
        if took < 0.0005:
            continue
        before = round(_TEXT_WIDTH * step.start / total)
        bar = " " * before + "▬" * max(1, round(_TEXT_WIDTH * took / total))
        numbers = f"{1000 * step.start:8.1f}{1000 * took:8.1f}"
        lines.append(f"{step.lane:10}{step.name:26}{numbers}  {bar}")
    return "\n".join([*lines, f"{'':10}{'all':26}{'':8}{1000 * total:8.1f}", ""])


def svg(found: list[Step]) -> str:
    """The steps as bars over a time axis in milliseconds."""
    total = max(step.end for step in found) or 1.0
    height = _TOP + _ROW * len(found) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 90}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-size="15">apppot run: {1000 * total:.0f} ms</text>',
    ]
    for number, step in enumerate(found):
        parts += _bar(step, _TOP + _ROW * number, total)
    parts += _axis(total, height - 22)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(step: Step, y: int, total: float) -> list[str]:
    x = _LEFT + _WIDTH * step.start / total
    width = max(1.0, _WIDTH * (step.end - step.start) / total)
    label = f"{1000 * (step.end - step.start):.1f} ms"
    return [
        f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{escape(step.name)}</text>',
        f'<rect x="{x:.1f}" y="{y + 2}" width="{width:.1f}" height="{_ROW - 5}"'
        f' fill="{_COLOURS[step.lane]}"><title>{escape(step.lane)}</title></rect>',
        f'<text x="{x + width + 4:.1f}" y="{y + 13}" fill="#555">{label}</text>',
    ]


def _axis(total: float, y: int) -> list[str]:
    parts = [f'<line x1="{_LEFT}" y1="{y}" x2="{_LEFT + _WIDTH}" y2="{y}" stroke="#999"/>']
    for number in range(5):
        x = _LEFT + _WIDTH * number / 4
        text = f"{1000 * total * number / 4:.0f} ms"
        parts.append(f'<text x="{x:.0f}" y="{y + 15}" text-anchor="middle">{text}</text>')
    return parts
