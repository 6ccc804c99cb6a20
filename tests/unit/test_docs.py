"""The documents speak of what there is: options, variables, links, messages."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from apppot.host.commands.table import build_parser
from apppot.host.original import start

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*DOCS, *sorted((ROOT / "docs" / "man").glob("*.txt"))]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def parsers(parser: argparse.ArgumentParser, words: str = "") -> Iterator[tuple[str, set[str]]]:
    """(subcommand, its options) for all subcommands."""
    yield words, set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from parsers(sub, f"{words} {name}".strip())


COMMANDS = dict(parsers(build_parser()))
ALL_OPTIONS = set().union(*COMMANDS.values()) | set(OPTION.findall(start.USAGE))


def code(path: Path) -> list[str]:
    """The lines of code in a document: fenced blocks and words in backquotes."""
    text = path.read_text()
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    indented = [line for line in rest.splitlines() if path.suffix == ".txt" and line[:2] == "  "]
    return [line for block in fenced for line in block.splitlines()] + [
        *re.findall(r"`([^`\n]+)`", rest),
        *indented,
    ]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_command_lines_have_options_that_exist(path: Path) -> None:
    for line in code(path):
        for part in re.split(r"[|;]|&&", line):
            words = part.split("#")[0].split()
            if "apppot" in words:
                check_command(words[words.index("apppot") + 1 :], line)


def check_command(words: list[str], line: str) -> None:
    """Fail when the subcommand, or an option in front of IMAGE, does not exist."""
    command = ""
    while words and f"{command} {words[0]}".strip() in COMMANDS:
        command = f"{command} {words.pop(0)}".strip()
    assert command or not words or words[0][0] in "-…", f"no such command: {line}"
    for option in OPTION.findall(" ".join(words)):
        assert option in COMMANDS[command], f"{command} has no {option}: {line}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_options_in_text_exist(path: Path) -> None:
    for line in code(path):
        if line.startswith("--"):
            assert set(OPTION.findall(line)) <= ALL_OPTIONS, line


def test_every_option_of_run_is_explained() -> None:
    text = (ROOT / "docs" / "running.md").read_text()
    told = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", text))
    parser = build_parser("run")
    (sub,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in sub.choices["run"]._actions:
        if action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
            assert set(action.option_strings) <= told, action.option_strings


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def sources() -> str:
    """The text of both packages, with string literals over several lines joined."""
    files = [*(ROOT / "host").rglob("*.py"), *(ROOT / "guest").rglob("*.py")]
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r"\"\s*\n\s*f?\"", "", text)


def test_variables_exist() -> None:
    text = sources()
    names = {name for p in TEXTS for name in re.findall(r"APPPOT_[A-Z_]*[A-Z]", p.read_text())}
    batch = r"\b(?:SLURM|NSLOTS|PBS)[A-Z_]*"
    names |= {name for path in TEXTS for name in re.findall(batch, path.read_text())}
    assert sorted(name for name in names if name not in text) == []


def test_variables_are_told() -> None:
    told = "\n".join(path.read_text() for path in TEXTS)
    names = set(re.findall(r"\"(APPPOT_[A-Z_]+)\"", sources()))
    assert sorted(name for name in names if name not in told) == []


def test_messages_of_the_trouble_table_exist() -> None:
    text = sources()
    table = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)[1:]
    assert len(rows) > 20
    for row in rows:
        if row.startswith("command: "):  # strerror's words
            continue
        for part in row.split("…"):
            words = re.sub(r"\(12\d\)|`", "", part).strip(" ,")
            assert words in text, f"no message has {words!r}"


def test_kernel_document_names_every_patch() -> None:
    text = (ROOT / "docs" / "kernel.md").read_text()
    patches = (ROOT / "image-recipes" / "kernel" / "uml" / "patches").glob("*.patch")
    assert [patch.name for patch in patches if patch.name not in text] == []


def test_design_names_every_frame_and_field() -> None:
    from apppot.guest.protocol import frames
    from apppot.guest.protocol.job import Job

    text = (ROOT / "docs" / "design.md").read_text()
    for number in frames.GUEST_TYPES | frames.HOST_TYPES:
        names = [n for n, v in vars(frames).items() if v == number and n.isupper()]
        assert any(f"| {name} | {number} |" in text for name in names), names
    assert [field for field in Job.FIELDS if f"`{field}`" not in text] == []


def test_manual_pages_are_made(tmp_path: Path) -> None:
    pytest.importorskip("argparse_manpage")
    import runpy
    import sys

    before = sys.argv
    sys.argv = ["make_man.py", str(tmp_path)]
    try:
        runpy.run_path(str(ROOT / "docs" / "make_man.py"), run_name="__main__")
    finally:
        sys.argv = before
    page = (tmp_path / "apppot-run.1").read_text()
    assert "\\-\\-mem" in page
    assert ".SH EXAMPLES" in page
    assert ".SH EXIT STATUS" in (tmp_path / "apppot.1").read_text()
