"""`apppot image`: everything about the images of the store."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from apppot.host.common.units import format_size

if TYPE_CHECKING:
    from apppot.host.images.record import Record
    from apppot.host.images.upkeep import Removed

SHORT_DIGEST = 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `apppot image`."""
    parser.set_defaults(func=lambda _: _help(parser))
    actions = parser.add_subparsers(
        dest="image_command", metavar="ACTION", parser_class=type(parser)
    )

    text = "build an image from a recipe"
    build = actions.add_parser("build", help=text, description=text, allow_abbrev=False)
    build.add_argument("recipe", metavar="RECIPE", help="a recipe's name or file")
    build.add_argument("--name", default="", metavar="NAME[:VERSION]", help="not the recipe's own")
    build.add_argument("--force", action="store_true", help="build even if nothing changed")
    build.add_argument("--json", action="store_true", help="print the image's record as JSON")
    build.set_defaults(func=_build)

    text = "import a tar, a file system or disk image, or a container image"
    load = actions.add_parser("import", help=text, description=text, allow_abbrev=False)
    load.add_argument(
        "file",
        metavar="FILE",
        help="a file, - for standard input, oci:DIR[:TAG], docker-archive:FILE, docker://NAME[:TAG]",
    )
    load.add_argument("--name", default="", metavar="NAME[:VERSION]", help="default: the file's")
    load.add_argument("--command", default="", help="default command: words, or a JSON list")
    load.add_argument("--force", action="store_true", help="the name may move from another image")
    load.add_argument("--json", action="store_true", help="print the image's record as JSON")
    load.set_defaults(func=_import)

    text = "list the images"
    table = actions.add_parser("list", help=text, description=text, allow_abbrev=False)
    table.add_argument("--size", action="store_true", help="disk space, alone and shared by names")
    table.add_argument("--json", action="store_true", help="print JSON")
    table.set_defaults(func=_list)

    text = "show what is known about an image"
    inspect = actions.add_parser("inspect", help=text, description=text, allow_abbrev=False)
    inspect.add_argument("image", metavar="IMAGE", help="name[:version], digest or path")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(func=_inspect)
    _configure_commit(actions)
    _configure_upkeep(actions)


def _configure_commit(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "make an image of a base and its changes, or of a session"
    commit = actions.add_parser(
        "commit",
        help=text,
        description=text,
        allow_abbrev=False,
        usage="%(prog)s [OPTION]… (BASE --changes FILE… | --session SESSION) NAME[:VERSION]",
    )
    commit.add_argument("first", metavar="BASE", help="the changes' base; none with --session")
    name = commit.add_argument("second", metavar="NAME[:VERSION]")
    commit.add_argument(
        "--changes", metavar="FILE", action="append", default=[], help="changes, the lowest first"
    )
    commit.add_argument(
        "--session", metavar="SESSION", action=_Alone, other=name, help="its base and its changes"
    )
    commit.add_argument("-m", "--message", default="", metavar="TEXT", help="what it is for")
    commit.add_argument("--force", action="store_true", help="the name may move from another image")
    commit.add_argument("--json", action="store_true", help="print the image's record as JSON")
    commit.set_defaults(func=_commit)


class _Alone(argparse.Action):
    """An option beside which the positional argument `other` is not needed."""

    def __init__(self, *words: Any, other: argparse.Action, **options: Any) -> None:
        super().__init__(*words, **options)
        self._other = other

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        self._other.required = False


def _configure_upkeep(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "remove images; one in use by a virtual machine stays on the disk until it ends"
    remove = actions.add_parser("rm", help="remove images", description=text, allow_abbrev=False)
    remove.add_argument("images", metavar="IMAGE", nargs="+", help="name[:version], name:*, digest")
    remove.set_defaults(func=_remove)

    text = "remove images without a name, and what interrupted work has left"
    prune = actions.add_parser("prune", help=text, description=text, allow_abbrev=False)
    prune.set_defaults(func=_prune)

    text = "check images against their digests"
    verify = actions.add_parser("verify", help=text, description=text, allow_abbrev=False)
    verify.add_argument("images", metavar="IMAGE", nargs="*", help="default: all")
    verify.set_defaults(func=_verify)

    text = "give an image a further name"
    tag = actions.add_parser("tag", help=text, description=text, allow_abbrev=False)
    tag.add_argument("image", metavar="IMAGE", help="name[:version] or digest")
    tag.add_argument("name", metavar="NAME[:VERSION]")
    tag.add_argument("--force", action="store_true", help="the name may move from another image")
    tag.set_defaults(func=_tag)

    text = "write an image to a file for other tools, or as a disk that boots by itself"
    export = actions.add_parser("export", help=text, description=text, allow_abbrev=False)
    export.add_argument("image", metavar="IMAGE", help="name[:version], digest or path")
    forms = ("tar", "oci", "raw", "qcow2", "vdi", "vmdk", "ova")
    export.add_argument("--format", choices=forms, default="tar")
    export.add_argument("-o", "--output", metavar="FILE", required=True, help="for oci a directory")
    export.add_argument(
        "--changes",
        action="append",
        default=[],
        metavar="FILE",
        help="changes over the image on a disk that boots; may be repeated, the last on top",
    )
    export.add_argument(
        "--scratch", metavar="SIZE", help="space on the disk for what jobs write; default: memory"
    )
    export.add_argument(
        "--no-boot", action="store_true", help="raw, qcow2: one ext4 file system, no boot loader"
    )
    export.set_defaults(func=_export)


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 0


def _build(args: argparse.Namespace) -> int:
    from apppot.host.images.building import builder, recipe

    record, cached = builder.build(recipe.load(args.recipe), args.name, force=args.force)
    _report(record, args.json, " (unchanged since it was built)" if cached else "")
    return 0


def _import(args: argparse.Namespace) -> int:
    from apppot.host.images.importing import importer, transports
    from apppot.host.images.record import is_transport

    take = transports.import_reference if is_transport(args.file) else importer.import_file
    command = parse_command(args.command)
    _report(take(args.file, args.name, command, force=args.force), args.json)
    return 0


def parse_command(text: str) -> tuple[str, ...]:
    """A command given as words, quoted as in a shell, or as a JSON list of strings."""
    import shlex

    from apppot.host.common.errors import UsageError

    try:
        words = json.loads(text) if text.startswith("[") else shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--command {text!r}: {error}", "quote it as in a shell") from None
    if not all(isinstance(word, str) for word in words):
        raise UsageError(f"--command {text!r} is not a list of strings")
    return tuple(words)


def _report(record: Record, as_json: bool, remark: str = "") -> None:
    if as_json:
        print(json.dumps(as_data(record), indent=1))
        return
    short = record.digest[:SHORT_DIGEST]
    print(f"{record.name}:{record.version}  {short}  {format_size(record.size)}{remark}")


def as_data(record: Record) -> dict[str, object]:
    """A record for `--json`."""
    from dataclasses import asdict

    return asdict(record)


def _commit(args: argparse.Namespace) -> int:
    from apppot.host.common.errors import UsageError
    from apppot.host.images.changes import commit, inguest

    if args.session is None:
        layers, name = inguest.Layers(args.first, tuple(args.changes)), args.second
    elif args.second is not None or args.changes:
        hint = "leave BASE and --changes out"
        raise UsageError("a session knows its base and the changes that it began with", hint)
    else:
        layers, name = commit.of_session(args.session), args.first
    _report(commit.commit(layers, name, args.message, force=args.force), args.json)
    return 0


def _list(args: argparse.Namespace) -> int:
    from apppot.host.images import store

    rows = store.list_images()
    if args.size:
        return _list_sizes(args.json)
    if args.json:
        print(json.dumps([{**as_data(record), "store": place} for place, record in rows], indent=1))
        return 0
    if not rows:
        print("no images yet: apppot image build debian-12")
        return 0
    head = ("NAME", "VERSION", "DIGEST", "SIZE", "FORMAT", "CREATED", "DESCRIPTION")
    _table([head, *(_row(record) for _, record in rows)])
    return 0


def _list_sizes(as_json: bool) -> int:
    """Like du: what goes with a name, and what other names share with it."""
    from dataclasses import asdict

    from apppot.host.images import store, upkeep

    sizes, total = upkeep.sizes(), upkeep.total()
    images = [
        (record, sizes[place, record.name, record.version]) for place, record in store.list_images()
    ]
    if as_json:
        rows = [
            {
                "name": record.name,
                "version": record.version,
                "digest": record.digest,
                **asdict(size),
            }
            for record, size in images
        ]
        print(json.dumps({"images": rows, "total": total}, indent=1))
        return 0
    head = ("NAME", "VERSION", "DIGEST", "UNIQUE", "SHARED")
    body = [
        (*_row(record)[:3], format_size(size.unique), format_size(size.shared))
        for record, size in images
    ]
    _table([head, *body])
    print(f"total: {format_size(total)}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    from apppot.host.images import upkeep

    _report_removed(upkeep.remove(args.images))
    return 0


def _prune(_: argparse.Namespace) -> int:
    from apppot.host.images import upkeep

    _report_removed(upkeep.prune())
    return 0


def _report_removed(removed: Removed) -> None:
    for name in removed.names:
        print(f"removed {name}")
    for name in removed.kept:
        print(f"in use by a virtual machine, stays until `apppot image prune`: {name}")
    print(f"freed {format_size(removed.freed)}")


def _verify(args: argparse.Namespace) -> int:
    from apppot.host.common.errors import ImageError
    from apppot.host.images import upkeep

    problems = upkeep.verify(args.images)
    if problems:
        text = "\n".join(f"{label}: {problem}" for label, problem in problems)
        raise ImageError(text, "apppot image rm, then build, import or pull it again")
    print("all images are as their digests say")
    return 0


def _tag(args: argparse.Namespace) -> int:
    from apppot.host.images import upkeep

    _report(upkeep.tag(args.image, args.name, force=args.force), as_json=False)
    return 0


def _export(args: argparse.Namespace) -> int:
    from apppot.host.common.units import parse_size
    from apppot.host.images.exporting import export

    scratch = parse_size(args.scratch) if args.scratch else 0
    wishes = export.Wishes(not args.no_boot, tuple(args.changes), scratch)
    export.export(args.image, args.format, args.output, wishes)
    return 0


def _row(record: Record) -> tuple[str, ...]:
    return (
        record.name,
        record.version or "-",
        record.digest[:SHORT_DIGEST],
        format_size(record.size),
        record.format,
        record.created.replace("T", " ")[:16],
        record.description,
    )


def _table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _inspect(args: argparse.Namespace) -> int:
    import shlex
    from dataclasses import asdict

    from apppot.host.images.resolve import resolve

    image = resolve(args.image)
    probed = {key: value for key, value in asdict(image.probed).items() if key != "dirty"}
    data: dict[str, object] = {"path": image.path, **probed}
    if image.record is not None:
        data |= as_data(image.record)
    if args.json:
        print(json.dumps(data, indent=1))
        return 0
    for key, value in data.items():
        if isinstance(value, tuple):
            value = shlex.join(value)
        elif key == "size" and isinstance(value, int):
            value = f"{format_size(value)} ({value} bytes)"
        elif isinstance(value, dict):
            value = " ".join(f"{name}={content}" for name, content in value.items())
        if value:
            print(f"{key + ':':14}{value}")
    return 0
