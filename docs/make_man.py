"""Write the manual pages: usage and options from the parser, the rest from docs/man/*.txt.

    python docs/make_man.py FOLDER

A text file holds sections: a line of capitals is a heading, a paragraph that is indented is
shown as it stands, "term -- explanation" is an entry of a list, `words` are bold.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from apppot.host.commands.table import COMMANDS, build_parser, version
from argparse_manpage.manpage import Manpage

TEXTS = Path(__file__).resolve().parent / "man"
CHANGELOG = TEXTS.parents[1] / "CHANGELOG.md"
HEADING = re.compile(r"[A-Z][A-Z ]+")
TOP = "apppot"


def escape(text: str) -> str:
    """Plain text as roff; `words` in backquotes are set in bold."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", text)
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def paragraph(text: str) -> str:
    """One paragraph of a text file as roff."""
    if text.startswith("  "):
        lines = "\n".join(line[2:] for line in text.splitlines())
        return f".PP\n.nf\n.RS 4\n{escape(lines)}\n.RE\n.fi"
    if " -- " in text.splitlines()[0]:
        return "\n".join(_entry(item) for item in re.split(r"\n(?=\S)", text))
    return f".PP\n{escape(text)}"


def _entry(text: str) -> str:
    term, _, meaning = text.partition(" -- ")
    words = re.sub(r"\n\s+", "\n", meaning)
    return f".TP\n{escape(term)}\n{escape(words)}"


def sections(text: str) -> dict[str, str]:
    """Heading -> roff, in the order of a text file."""
    found: dict[str, list[str]] = {}
    heading = ""
    for block in re.split(r"\n\s*\n", text.rstrip("\n")):
        first, _, rest = block.strip("\n").partition("\n")
        if HEADING.fullmatch(first):
            heading, block = first, rest
            found[heading] = []
        if block:
            found[heading].append(paragraph(block.strip("\n")))
    return {name: "\n".join(parts) for name, parts in found.items()}


def pages() -> dict[str, argparse.ArgumentParser]:
    """Page -> its parser: one for the whole, one for each subcommand."""
    parser = build_parser()
    found: dict[str, argparse.ArgumentParser] = {TOP: parser}
    for group in parser._action_groups:
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{TOP}-{name}": action.choices[name] for name in COMMANDS}
                # Each has a page of its own.
                group._group_actions.remove(action)
    return found


def page(name: str, parser: argparse.ArgumentParser, date: str) -> str:
    """The manual page `name` for a parser."""
    data = {
        "description": (parser.description or "").rstrip("."),
        "date": date,
        "project_name": TOP,
        "version": version(),
        "manual_title": "AppPot",
    }
    text = TEXTS / f"{name}.txt"
    written = sections(text.read_text()) if text.exists() else {}
    parser.epilog = None  # the page says it at more length
    usage = " ".join(parser.format_usage().split()[1:])
    written["SYNOPSIS"] = f".B {escape(usage)}"
    if "DESCRIPTION" in written:
        parser.description = None
    made = Manpage(parser, data, format="single-commands-section")
    made.prog = name
    if name == TOP:
        entries = [f".TP\n\\fBapppot {word}\\fR\n{escape(COMMANDS[word][1])}" for word in COMMANDS]
        made.add_section("COMMANDS", ">", "\n".join(entries))
    for heading, content in written.items():
        made.add_section(heading, ">", content)
    others = sorted({TOP, *(f"{TOP}-{word}" for word in COMMANDS)} - {name})
    made.add_section("SEE ALSO", ">", ", ".join(f"\\fB{escape(o)}\\fR(1)" for o in others))
    return str(made)


def changed() -> str:
    """The newest date in the changelog, so that the same tree gives the same pages."""
    found = re.search(r"\d{4}-\d{2}-\d{2}", CHANGELOG.read_text())
    return found[0] if found else "unreleased"


def main() -> None:
    """Write all pages."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/man")
    folder.mkdir(parents=True, exist_ok=True)
    found = pages()
    for name, parser in found.items():
        (folder / f"{name}.1").write_text(page(name, parser, changed()))
    print(f"{len(found)} manual pages in {folder}")


if __name__ == "__main__":
    main()
