"""`apppot pull`: bring an image from a repository into the store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `apppot pull`."""
    parser.add_argument("reference", metavar="[URL/]NAME[:VERSION]", help="what to pull")
    parser.add_argument(
        "--repository",
        metavar="URL",
        action="append",
        default=[],
        help="where from; several are mirrors, or asked in turn ($APPPOT_REPOSITORIES)",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="copy it there, too")
    parser.add_argument("--json", action="store_true", help="print the image's record as JSON")
    parser.set_defaults(func=_pull)


def _pull(args: argparse.Namespace) -> int:
    import json

    from apppot.host.commands.image import SHORT_DIGEST, as_data
    from apppot.host.common.units import format_size
    from apppot.host.repository import pull

    # A repository that is named in the reference does not mix with the configured ones.
    urls = args.repository or ([] if "/" in args.reference else configured())
    done = pull.pull(pull.parse(args.reference, urls))
    if args.output:
        pull.copy_out(done.path, args.output)
    record = done.record
    if args.json:
        data = {**as_data(record), "path": done.path, "fetched": done.fetched}
        print(json.dumps(data, indent=1))
        return 0
    remark = "was here already" if done.present else f"{format_size(done.fetched)} fetched"
    short = record.digest[:SHORT_DIGEST]
    print(f"{record.name}:{record.version}  {short}  {format_size(record.size)}  {remark}")
    return 0


def configured() -> Sequence[str]:
    """The repositories of environment and configuration files, the most preferred first."""
    from apppot.host.common import paths
    from apppot.host.config.settings import resolve

    setting = resolve(files=paths.config_files()).repositories
    return (setting.value or "").replace(",", " ").split()
