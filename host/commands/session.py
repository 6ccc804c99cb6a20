"""`apppot session`: what is kept under a name between consoles."""

from __future__ import annotations

import argparse
import json
import sys


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `session`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the sessions", allow_abbrev=False)
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(func=_list)
    removing = actions.add_parser("rm", help="delete sessions", allow_abbrev=False)
    removing.add_argument("names", metavar="NAME", nargs="+")
    removing.set_defaults(func=_remove)
    resizing = actions.add_parser("resize", help="let a session grow", allow_abbrev=False)
    resizing.add_argument("name", metavar="NAME")
    resizing.add_argument("size", metavar="SIZE", help="like 32G")
    resizing.set_defaults(func=_resize)


def _list(args: argparse.Namespace) -> int:
    from apppot.host.common.text import printable
    from apppot.host.common.units import format_size
    from apppot.host.images import sessions

    found = sessions.list_sessions()
    if args.json:
        rows = [
            {
                "name": session.name,
                "image": session.image,
                "base": session.base,
                "created": session.created,
                "size": session.size(),
                "used": session.used(),
            }
            for session in found
        ]
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return 0
    sys.stdout.write(f"{'NAME':20} {'IMAGE':24} {'USED':>9} {'SIZE':>9}  CREATED\n")
    for session in found:
        used, size = format_size(session.used()), format_size(session.size())
        image = printable(session.image) or "(damaged)"
        line = f"{session.name:20} {image:24} {used:>9} {size:>9}  {session.created}"
        sys.stdout.write(line + "\n")
    return 0


def _remove(args: argparse.Namespace) -> int:
    from apppot.host.images import sessions

    for name in args.names:
        sessions.remove(sessions.get_any(name))
    return 0


def _resize(args: argparse.Namespace) -> int:
    from apppot.host.common.units import parse_size
    from apppot.host.images import sessions

    sessions.resize(sessions.get(args.name), parse_size(args.size))
    return 0
