"""`apppot publish`: write images and changes into a static web folder, signed."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `apppot publish`."""
    add = parser.add_argument
    add("folder", metavar="DIR", help="the repository: any web server can serve it")
    add("images", metavar="IMAGE", nargs="*", help="name[:version] or digest of a stored image")
    add("--changes", metavar="[NAME[:VERSION]=]FILE", action="append", default=[], help="as well")
    add("--key", metavar="NAME", action="append", default=[], help="sign with this key (or keys)")
    add("--description", default="", metavar="TEXT", help="what it is, instead of the image's own")
    add("--remove", metavar="NAME[:VERSION]", action="append", default=[], help="offer no longer")
    add("--prune", action="store_true", help="delete files that nothing refers to any more")
    add("--json", action="store_true", help="print what was done as JSON")
    parser.set_defaults(func=_publish)


def _publish(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from apppot.host.common.units import format_size
    from apppot.host.repository import keys, publish

    wish = publish.Publication(args.images, args.changes, args.remove, args.description, args.prune)
    done = publish.publish(args.folder, wish, args.key or [keys.choose("")])
    if args.json:
        print(json.dumps(asdict(done), indent=1))
        return 0
    pruned = f", {done.pruned} old files removed" if done.pruned else ""
    print(
        f"{args.folder}: serial {done.serial}, {done.entries} images and changes, "
        f"{format_size(done.written)} new{pruned}"
    )
    return 0
