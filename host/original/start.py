"""`apppot-start`: the command line of the original AppPot, for the wrapper scripts that sites have.

It only translates: what it finds becomes the request of an `apppot run`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from apppot.host import cli
from apppot.host.commands.parser import nearest
from apppot.host.commands.table import version
from apppot.host.common.errors import ImageError, UsageError

PROGRAM = "apppot-start"
DEFAULT_IMAGE = "apppot.img"
USAGE = f"""\
usage: {PROGRAM} [OPTION]… [COMMAND [ARG]…]

Start a virtual machine as the original AppPot did, and return COMMAND's exit status.  Without
COMMAND: the executable `apppot-run` in this directory, else `apppot-autorun` in the image, else
a shell.  This directory is /home/user/job in the guest.

  --apppot, --image IMG     image: a file, a name of `apppot image list`, or `host`
                            (default: $APPPOT_IMAGE, then {DEFAULT_IMAGE})
                    What is written is kept in a session of the image's name, without
                    --changes; IMG stays as it is.  `apppot session rm NAME` begins afresh.
                    COW:IMG write to the file COW, made where it is missing; IMG stays as it is
  --changes, --merge FILE   changes over the image: squashfs, EROFS, or a tar
  --mem SIZE                guest memory; a plain number is megabytes ($APPPOT_MEM; 512M)
  --uml, --linux, --kernel FILE
                            guest kernel instead of AppPot's own ($APPPOT_KERNEL)
  --slirp [PATH]            accepted; the network goes through slirp4netns
  --id, --umid NAME         accepted; signals to this process control the guest
  --extra, -X WORDS         more words for the kernel's command line
  --version, -V             print the version
  --help, -h                print this

All else is set as for `apppot run`, through its environment variables and configuration.
"""

# Option -> the field of `CommandLine` that takes the next word.
_WITH_VALUE = {
    "--apppot": "image",
    "--image": "image",
    "--changes": "changes",
    "--merge": "changes",
    "--mem": "memory",
    "--uml": "kernel",
    "--linux": "kernel",
    "--kernel": "kernel",
    "--id": "name",
    "--umid": "name",
    "--extra": "extra",
    "-X": "extra",
}
_ALONE = ("--slirp", "--help", "-h", "--version", "-V")


@dataclass
class CommandLine:
    """What the command line says; None and empty: nothing."""

    image: str | None = None
    changes: list[str] = field(default_factory=list)
    memory: str | None = None
    kernel: str | None = None
    name: str | None = None
    extra: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    show: str = ""  # "help" or "version"


def parse(words: Sequence[str]) -> CommandLine:
    """The options up to the first word that is none; the rest is the command.

    Raises UsageError with a suggestion for an unknown option.
    """
    options, left = CommandLine(), list(words)
    while left and left[0].startswith("-") and left[0] != "-":
        word = left.pop(0)
        if word == "--":
            break
        _option(options, word, left)
    options.command = left
    return options


def _option(options: CommandLine, word: str, left: list[str]) -> None:
    name, equals, value = word.partition("=")
    if name in _WITH_VALUE:
        if not equals and not left:
            raise UsageError(f"{name} needs a value", f"see `{PROGRAM} --help`")
        _set(options, _WITH_VALUE[name], value if equals else left.pop(0))
    elif name == "--slirp":
        # The original's always takes a path; here it may be left out before another option.
        if not equals and left and left[0][:1] != "-":
            left.pop(0)
    elif word in ("--help", "-h"):
        options.show = "help"
    elif word in ("--version", "-V"):
        options.show = "version"
    else:
        near = nearest(name, [*_WITH_VALUE, *_ALONE])
        raise UsageError(f"unknown option {name}{near}", f"see `{PROGRAM} --help`")


def _set(options: CommandLine, name: str, value: str) -> None:
    match name:
        case "extra":
            options.extra += value.split()
        case "changes":
            options.changes.append(value)
        case _:
            setattr(options, name, value)


def split_pair(text: str) -> tuple[str, str] | None:
    """(COW file, image) where `text` is the pair COW:IMAGE or COW,IMAGE; None for one image.

    NAME:VERSION of the image store looks the same: what is after the colon decides, a file.
    """
    if os.path.exists(text):
        return None
    for separator in (",", ":"):
        cow, found, image = text.partition(separator)
        if found and cow and image and (separator == "," or "/" in text or os.path.isfile(image)):
            return cow, image
    return None


def dispatch(words: Sequence[str]) -> int:
    """Run one command line; returns its exit status."""
    options = parse(words)
    if options.show == "help":
        sys.stdout.write(USAGE)
        return 0
    if options.show == "version":
        print(f"{PROGRAM} {version()}")
        return 0
    image = options.image or os.environ.get("APPPOT_IMAGE") or DEFAULT_IMAGE
    pair = split_pair(image)
    changes = options.changes
    if changes:
        written = pair[0] if pair else image if _session(image) else None
        if written is not None:
            _notice(f"with --changes, {written} is not written to: other changes are lost")
        return _run(options, _readable(pair) if pair else image, changes, None)
    if pair is None:
        return _run_in_session(options, image)
    return _run_pair(options, pair)


def _session(image: str) -> str | None:
    from apppot.host.original import session as automatic

    return automatic.session_for(image)


def _run_in_session(options: CommandLine, image: str) -> int:
    """Run with the session that belongs to `image`, where it has one."""
    from apppot.host.images import sessions
    from apppot.host.original import session as automatic

    name = _session(image)
    if name is not None and not automatic.can_keep():
        _notice(f"nothing is kept of what is written over {image}: no room for {sessions.home()}")
        name = None
    if name is None:
        return _run(options, image, [], None)
    afresh = f"`apppot session rm {name}`"
    if sessions.find(name) is None:
        _notice(f"what is written over {image} is kept as session {name}; {afresh} begins afresh")
    try:
        return _run(options, image, [], None, name)
    except sessions.SessionError as error:
        hint = f"COW:IMG gives each start a file of its own; {afresh} begins afresh"
        raise sessions.SessionError(error.cause, hint) from error


def _notice(text: str) -> None:
    sys.stderr.write(f"{PROGRAM}: {text}\n")


def _readable(pair: tuple[str, str]) -> str:
    """The image alone, where the COW file holds nothing that would be missed."""
    if os.path.exists(pair[0]):
        raise UsageError(
            f"--changes over {pair[0]}, which has changes of its own, is not possible yet",
            "leave one of the two out",
        )
    return pair[1]


def _run_pair(options: CommandLine, pair: tuple[str, str]) -> int:
    from apppot.host.images.probe import ImageFormat, probe
    from apppot.host.original import cow

    path, image = (os.path.realpath(name) for name in pair)
    found = probe(image)
    if found.format not in (ImageFormat.EXT4, ImageFormat.RAW):
        raise ImageError(
            f"{image} is {found.format}: nothing can be written over it in a COW file",
            "give an ext2/3/4 file system or a raw disk, or leave the COW file out",
        )
    cow.prepare(path, image)
    try:
        return _run(options, None, [], (path, image, found.offset))
    finally:
        cow.name_backing(path, image)


def _run(
    options: CommandLine,
    image: str | None,
    changes: list[str],
    pair: tuple[str, str, int] | None,
    session: str | None = None,
) -> int:
    from apppot.host.commands.options import command
    from apppot.host.commands.run import run_wish
    from apppot.host.config.settings import Options
    from apppot.host.runs.wish import Wish

    wish = Wish(
        image=image,
        argv=command(options.command),
        options=Options(image=image, memory=options.memory, kernel=options.kernel),
        changes=tuple(changes),
        session=session,
        cow=pair,
        extra=tuple(options.extra),
        run_scripts=True,
    )
    return run_wish(wish)


def main() -> NoReturn:
    """Entry point."""
    cli.main(sys.argv[1:], dispatch)


__all__ = ["main", "parse", "split_pair"]
