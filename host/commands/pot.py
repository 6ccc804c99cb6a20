"""`apppot pot`: build, export and import the kernels and the runtime."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "build what is missing or out of date: the kernels and the runtime"
    build = actions.add_parser("build", help=text, description=text, allow_abbrev=False)
    build.add_argument("--no-kernel", action="store_true", help="only the runtime")
    build.add_argument("--force", action="store_true", help="build although nothing changed")
    build.add_argument("--refresh", action="store_true", help="take newer packages, if any")
    build.set_defaults(func=_build)
    text = "write kernels and runtime into one file, for a machine without compilers"
    export = actions.add_parser("export", help=text, description=text, allow_abbrev=False)
    export.add_argument("file", metavar="FILE.tar")
    export.set_defaults(func=_export)
    text = "take kernels and runtime from a file that `apppot pot export` wrote"
    take = actions.add_parser("import", help=text, description=text, allow_abbrev=False)
    take.add_argument("file", metavar="FILE.tar")
    take.set_defaults(func=_import)
    text = "say what is in the pot"
    show = actions.add_parser("show", help=text, description=text, allow_abbrev=False)
    show.set_defaults(func=_show)


def _build(args: argparse.Namespace) -> int:
    from apppot.host.pot.runtime import build_runtime

    # The runtime first: with it, and Debian's stock kernel, `apppot run` works already.
    build_runtime(args.force, args.refresh)
    if not args.no_kernel:
        from apppot.host.pot.kernel import build_kernels

        build_kernels(force=args.force)
    return _show(args)


def _show(args: argparse.Namespace) -> int:
    from apppot.host.common.errors import PotError
    from apppot.host.pot.layout import find_pot, find_x86_kernel

    pot = find_pot()
    kind = "tuned" if pot.kernel.tuned else "Debian's stock kernel"
    print(f"kernel   {pot.kernel.release} ({kind})  {pot.kernel.path}")
    try:
        other = find_x86_kernel()
        print(f"kernel   {other.release} (x86-64)  {other.vmlinux}")
    except PotError as error:
        print(f"kernel   none for QEMU and Xen: {error.hint}")
    print(f"runtime  {pot.runtime_digest[:16]}  {pot.runtime}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from apppot.host.common.units import format_size
    from apppot.host.pot.archive import export_pot

    size = export_pot(args.file)
    print(f"{args.file}: {format_size(size)}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from apppot.host.pot.archive import import_pot

    import_pot(args.file)
    return _show(args)
