"""What the agent generates, for an image that is written to: there is no layer to put it in.

The accounts become the image's own, as the original AppPot did it: a program that adds one
replaces the file.  What belongs to this one run is bound over the image's files and leaves no
trace but an empty file where there was none.
"""

from __future__ import annotations

import os
import stat

from apppot.guest import syscalls
from apppot.guest.console import log

_KEPT = ("etc/passwd", "etc/group", "etc/shadow", "etc/sudoers", "etc/sudoers.d/apppot")


def install(generated: str, root: str) -> None:
    """Bring the tree `generated` into the writable image at `root`."""
    for folder, folders, files in os.walk(generated):
        place = os.path.relpath(folder, generated)
        for name in folders:
            _directory(folder, os.path.join(root, place, name), name)
        for name in files:
            path = os.path.normpath(os.path.join(place, name))
            install_file = _keep if path in _KEPT else _bind
            try:
                install_file(os.path.join(folder, name), os.path.join(root, path))
            except OSError as error:
                log(f"{path} stays the image's own: {error}")


def supply(tree: str, root: str) -> None:
    """Lend the files of `tree` (sudo) to an image that has none of that name."""
    for folder, _, files in os.walk(tree):
        for name in files:
            source = os.path.join(folder, name)
            target = os.path.join(root, os.path.relpath(source, tree))
            if not os.path.lexists(target) or os.stat(target).st_size == 0:
                try:
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    _bind(source, target)
                except OSError as error:
                    log(f"{name} cannot be lent: {error}")


def _directory(folder: str, target: str, name: str) -> None:
    if not os.path.isdir(target):
        os.mkdir(target)
        _like(os.stat(os.path.join(folder, name)), target)


def _like(found: os.stat_result, target: str) -> None:
    os.chown(target, found.st_uid, found.st_gid)
    os.chmod(target, stat.S_IMODE(found.st_mode))


def _keep(source: str, target: str) -> None:
    """Write the file into the image where it differs, in one step."""
    with open(source, "rb") as file:
        data = file.read()
    try:
        with open(target, "rb") as file:
            if file.read() == data:
                return
    except FileNotFoundError:
        pass
    temporary = target + ".apppot"
    with open(temporary, "wb") as file:
        file.write(data)
    _like(os.stat(source), temporary)
    os.replace(temporary, target)


def _bind(source: str, target: str) -> None:
    if not os.path.exists(target):
        if os.path.islink(target):
            os.unlink(target)  # /etc/resolv.conf into a /run that is empty now
        open(target, "xb").close()
    syscalls.mount(source, os.path.realpath(target), None, syscalls.MS_BIND)
