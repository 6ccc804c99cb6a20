"""`apppot kernel`: build the kernels of the guests."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "build the guest kernels from Debian's source package"
    build = actions.add_parser("build", help=text, description=text, allow_abbrev=False)
    # The names of recipes.KERNELS, which the launcher's start has no time to import.
    names = ("uml", "x86_64")
    text = "uml: User-Mode Linux; x86_64: QEMU, KVM, Xen and exported disks; default: both"
    build.add_argument("name", nargs="?", choices=names, metavar="uml|x86_64", help=text)
    build.add_argument("--jobs", "-j", type=positive, metavar="N", help="default: all CPUs")
    build.add_argument("--force", action="store_true", help="build although nothing changed")
    build.set_defaults(func=_build)
    text = "say which kernels `apppot run` would take"
    show = actions.add_parser("show", help=text, description=text, allow_abbrev=False)
    show.add_argument("--json", action="store_true", help="for scripts")
    show.add_argument("--kernel", metavar="FILE", help="look at this User-Mode Linux kernel")
    show.set_defaults(func=_show)


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _build(args: argparse.Namespace) -> int:
    from apppot.host.pot.kernel import build_kernels
    from apppot.host.pot.recipes import KERNELS

    names = (args.name,) if args.name else KERNELS
    for name, entry in build_kernels(names, args.jobs, args.force).items():
        print(f"kernel {name} {entry['release']} ({entry['source']}) is in the pot")
    return 0


def _show(args: argparse.Namespace) -> int:
    import json

    from apppot.host.pot.layout import KERNEL_HINT, find_kernel, lpj_for

    kernel = find_kernel(kernel=args.kernel)
    facts: dict[str, object] = {
        "path": kernel.path,
        "release": kernel.release,
        "digest": kernel.digest,
        "tuned": kernel.tuned,
        "features": sorted(kernel.features),
        "modules": kernel.modules,
        "lpj": lpj_for(kernel),
    }
    other = None if args.kernel else _x86_64()
    if args.json:
        print(json.dumps({**facts, "x86_64": other}, indent=1))
        return 0
    _table(facts)
    if not kernel.tuned:
        print(f"hint: {KERNEL_HINT}")
    if other:
        print("\nx86_64")
        _table(other)
    return 0


def _x86_64() -> dict[str, object] | None:
    """What there is to say of the x86-64 kernel; None where the pot has none."""
    from apppot.host.common.errors import PotError
    from apppot.host.pot.layout import find_x86_kernel

    try:
        kernel = find_x86_kernel()
    except PotError:
        return None
    return {
        "path": kernel.vmlinux,
        "bzimage": kernel.bzimage,
        "release": kernel.release,
        "digest": kernel.digest,
        "features": sorted(kernel.features),
    }


def _table(facts: dict[str, object]) -> None:
    for name, value in facts.items():
        print(f"{name:9} {' '.join(value) if isinstance(value, list) else value}")
