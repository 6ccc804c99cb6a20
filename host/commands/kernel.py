"""`apppot kernel`: build the guest kernel."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "build the tuned User-Mode Linux kernel from Debian's source package"
    build = actions.add_parser("build", help=text, description=text, allow_abbrev=False)
    build.add_argument("--jobs", "-j", type=positive, metavar="N", help="default: all CPUs")
    build.add_argument("--force", action="store_true", help="build although nothing changed")
    build.set_defaults(func=_build)
    text = "say which kernel `apppot run` would take"
    show = actions.add_parser("show", help=text, description=text, allow_abbrev=False)
    show.add_argument("--json", action="store_true", help="for scripts")
    show.add_argument("--kernel", metavar="FILE", help="look at this kernel")
    show.set_defaults(func=_show)


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _build(args: argparse.Namespace) -> int:
    from apppot.host.pot.kernel import build_kernel

    entry = build_kernel(args.jobs, args.force)
    print(f"kernel {entry['release']} ({entry['source']}) is in the pot")
    return 0


def _show(args: argparse.Namespace) -> int:
    import json

    from apppot.host.pot.layout import KERNEL_HINT, find_kernel, lpj_for

    kernel = find_kernel(kernel=args.kernel)
    facts = {
        "path": kernel.path,
        "release": kernel.release,
        "digest": kernel.digest,
        "tuned": kernel.tuned,
        "features": sorted(kernel.features),
        "modules": kernel.modules,
        "lpj": lpj_for(kernel),
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    for name, value in facts.items():
        print(f"{name:9} {' '.join(value) if isinstance(value, list) else value}")
    if not kernel.tuned:
        print(f"hint: {KERNEL_HINT}")
    return 0
