"""`apppot key`: keys that sign repositories, and whom to trust."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `apppot key`."""
    parser.set_defaults(func=lambda _: _help(parser))
    actions = parser.add_subparsers(dest="key_command", metavar="ACTION", parser_class=type(parser))

    text = "make a key pair to sign repositories with"
    create = actions.add_parser("create", help=text, description=text, allow_abbrev=False)
    create.add_argument("name", metavar="NAME", nargs="?", default="default", help="its name")
    create.set_defaults(func=_create)

    text = "list own and trusted keys"
    table = actions.add_parser("list", help=text, description=text, allow_abbrev=False)
    table.add_argument("--json", action="store_true", help="print JSON")
    table.set_defaults(func=_list)

    text = "trust what a key signs"
    trust = actions.add_parser("trust", help=text, description=text, allow_abbrev=False)
    _add_key(trust)
    trust.add_argument(
        "--repository", default="", metavar="URL", help="only there; forgets how new it was"
    )
    trust.set_defaults(func=_trust)

    text = "trust a key no longer"
    untrust = actions.add_parser("untrust", help=text, description=text, allow_abbrev=False)
    _add_key(untrust)
    untrust.add_argument("--repository", default="", metavar="URL", help="only not there")
    untrust.set_defaults(func=_untrust)


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", metavar="PUBKEY", help="ed25519:…, or a .pub file")


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _create(args: argparse.Namespace) -> int:
    from apppot.host.repository import keys

    key = keys.create(args.name)
    print(key.public)
    return 0


def _list(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from apppot.host.repository import keys

    own, pins = keys.own_keys(), keys.pins()
    if args.json:
        data = {"own": [asdict(key) for key in own], "trusted": [asdict(pin) for pin in pins]}
        print(json.dumps(data, indent=1))
        return 0
    for key in own:
        print(f"own      {key.public}  {key.name}")
    for pin in pins:
        print(f"trusted  {pin.key}  {pin.repository or 'everywhere'}")
    if not own and not pins:
        print("no keys yet: apppot key create, or apppot key trust PUBKEY --repository URL")
    return 0


def _trust(args: argparse.Namespace) -> int:
    from apppot.host.repository import catalogue, keys

    keys.trust(args.key, args.repository)
    if args.repository:
        catalogue.forget(keys.clean_url(args.repository))
    return 0


def _untrust(args: argparse.Namespace) -> int:
    from apppot.host.repository import keys

    keys.untrust(args.key, args.repository)
    return 0
