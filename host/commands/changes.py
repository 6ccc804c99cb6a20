"""`apppot changes`: what a session changed, as one file to send."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from apppot.host.common.errors import ImageError, UsageError

if TYPE_CHECKING:
    from apppot.host.images.changes.record import Changes


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `changes`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    saving = actions.add_parser("save", help="save a session's changes", allow_abbrev=False)
    saving.add_argument("session", metavar="SESSION")
    saving.add_argument("-o", "--output", metavar="FILE", help="default: SESSION.changes")
    saving.set_defaults(func=_save)
    inspecting = actions.add_parser("inspect", help="what a file belongs to", allow_abbrev=False)
    inspecting.add_argument("file", metavar="FILE")
    inspecting.add_argument("--json", action="store_true", help="as JSON")
    inspecting.set_defaults(func=_inspect)
    diffing = actions.add_parser("diff", help="list what is changed", allow_abbrev=False)
    diffing.add_argument("file", metavar="FILE")
    diffing.add_argument("--json", action="store_true", help="as JSON lines")
    diffing.set_defaults(func=_diff)
    verifying = actions.add_parser("verify", help="read a file to its end", allow_abbrev=False)
    verifying.add_argument("file", metavar="FILE")
    verifying.set_defaults(func=_verify)
    squashing = actions.add_parser("squash", help="make one of several", allow_abbrev=False)
    squashing.add_argument("files", metavar="FILE", nargs="+", help="the lowest first")
    squashing.add_argument("-o", "--output", metavar="FILE", required=True)
    squashing.set_defaults(func=_squash)


def _save(args: argparse.Namespace) -> int:
    from apppot.host.common.units import timestamp
    from apppot.host.images import sessions
    from apppot.host.images.changes import inguest
    from apppot.host.images.changes import record as changes
    from apppot.host.images.changes.session import image_of

    session = sessions.get(args.session)
    output = args.output or f"{session.name}.changes"
    base, *over = session.base.split("+")
    layers = inguest.Layers(image_of(session), session.changes, session.name)
    with inguest.result(output) as work:
        inguest.run(["save", os.path.basename(work)], layers, os.path.dirname(work))
        record = changes.Changes(base, session.image, timestamp(), tuple(over))
        changes.seal(work, record)
    sys.stderr.write(f"{output}: {os.path.getsize(output) >> 10} KiB, changes to {session.image}\n")
    return 0


def record_of(path: str) -> Changes:
    """The record of a changes file.  Raises ImageError where it has none."""
    from apppot.host.images import probe
    from apppot.host.images.changes import record as changes

    probe.probe(path)
    record = changes.read(path)
    if record is None:
        raise ImageError(f"{path!r} is not a changes file", "`apppot changes save` makes one")
    return record


def _inspect(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from apppot.host.common.files import file_digest
    from apppot.host.common.text import printable

    record = record_of(args.file)
    value = {**asdict(record), "digest": file_digest(args.file), "size": os.path.getsize(args.file)}
    if args.json:
        sys.stdout.write(json.dumps(value) + "\n")
        return 0
    for name, item in value.items():
        text = ", ".join(item) if isinstance(item, tuple) else f"{item}"
        sys.stdout.write(f"{name:8} {printable(text)}\n")
    return 0


def _entries(path: str) -> Iterator[dict[str, Any]]:
    """What is in a layer, an entry at a time: there may be millions."""
    import tempfile

    from apppot.host.images.changes import inguest

    with tempfile.TemporaryFile() as told:
        layers = inguest.Layers(os.path.abspath(path))
        inguest.run(["list", "0"], layers, None, stdout=told.fileno())
        told.seek(0)
        for line in told:
            yield json.loads(line)


_LETTERS = {"deleted": "D", "directory": "d", "replaced directory": "R", "file": "f", "link": "l"}


def _diff(args: argparse.Namespace) -> int:
    record_of(args.file)
    for entry in _entries(args.file):
        if args.json:
            sys.stdout.write(json.dumps(entry) + "\n")
            continue
        letter = _LETTERS.get(entry["type"], "?")
        # Names are a stranger's: control characters must not reach the terminal.
        name = entry["path"].encode("unicode_escape").decode("ascii")
        owner = f"{entry['uid']}:{entry['gid']}"
        size = entry["size"] if entry["type"] == "file" else ""
        sys.stdout.write(f"{letter} {entry['mode']:04o} {owner:>11} {size:>12} {name}\n")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from apppot.host.images.changes import inguest

    record_of(args.file)
    inguest.run(["verify", "0"], inguest.Layers(os.path.abspath(args.file)), None)
    sys.stderr.write(f"{args.file}: whole\n")
    return 0


def _squash(args: argparse.Namespace) -> int:
    from apppot.host.common.units import timestamp
    from apppot.host.images.changes import inguest
    from apppot.host.images.changes import record as changes

    records = [record_of(path) for path in args.files]
    if len({record.base for record in records}) != 1:
        raise UsageError("these changes belong to different bases", "apppot changes inspect FILE")
    first, *rest = [os.path.abspath(path) for path in args.files]
    layers = inguest.Layers(first, tuple(rest))
    numbers = [str(number) for number in range(len(args.files))]
    with inguest.result(args.output) as work:
        words = ["join", os.path.basename(work), *numbers]
        inguest.run(words, layers, os.path.dirname(work))
        last = records[-1]
        changes.seal(work, changes.Changes(last.base, last.image, timestamp(), records[0].over))
    return 0
