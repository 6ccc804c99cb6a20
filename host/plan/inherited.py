"""What a payload inherits of its caller's environment, and what of the host it does not see."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Of the host's root, what the image `host` leaves out: what belongs to this host's run, and homes.
HOST_HIDDEN = ("proc", "sys", "dev", "run", "tmp", "var/tmp", "home", "root", "mnt", "media")
# Below these lie no homes of all users, though one user's may.
_SYSTEM = ("", "opt", "usr", "var", "srv", "etc")


def hidden_of_host(env: Mapping[bytes, bytes]) -> tuple[str, ...]:
    """What the image `host` hides for a caller, as paths below the root: with the usual, his home.

    Where homes lie elsewhere, the directory that holds his is taken for the one of all homes.
    """
    home = os.path.normpath(os.fsdecode(env.get(b"HOME", b"/"))).lstrip("/")
    place = os.path.dirname(home)
    if place.split("/")[0] in _SYSTEM:
        place = home
    if not place or any(place == path or place.startswith(f"{path}/") for path in HOST_HIDDEN):
        return HOST_HIDDEN
    return (*HOST_HIDDEN, place)


# Of the caller's environment, what makes no sense in the guest: paths and sockets of the host.
_DROPPED = frozenset(
    b"HOME PATH USER LOGNAME SHELL PWD OLDPWD SHLVL _ MAIL HOSTNAME TMPDIR TMP TEMP DISPLAY "
    b"WAYLAND_DISPLAY XAUTHORITY DBUS_SESSION_BUS_ADDRESS LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME "
    b"PYTHONPATH VIRTUAL_ENV CONDA_PREFIX PERL5LIB MANPATH INVOCATION_ID JOURNAL_STREAM".split()
)
_DROPPED_PREFIXES = (b"XDG_", b"SSH_", b"APPPOT_", b"BASH_FUNC_", b"GPG_", b"PYENV", b"CONDA_")


def kept_environment(env: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The part of the caller's environment that the payload inherits."""
    return {
        name: value
        for name, value in env.items()
        if name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES)
    }
