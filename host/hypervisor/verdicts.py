"""What this boot of the host has shown: hypervisors whose guests never came to life.

`/dev/kvm` may open, run a first instruction, and hang every guest.  Only a guest shows that, which
takes seconds; so the next launcher is told.
"""

from __future__ import annotations

import os
from contextlib import suppress

from apppot.host.common.files import read_json, write_json
from apppot.host.common.host import boot_id
from apppot.host.common.paths import cache_home
from apppot.host.hypervisor.base import HypervisorName


def remember(name: HypervisorName, kernel_digest: str, reason: str) -> None:
    """Note that a guest of this hypervisor with this kernel did not say HELLO, and why."""
    silent = {**_silent(), _key(name, kernel_digest): reason}
    with suppress(OSError):  # the next launcher finds out for itself
        write_json(_path(), {"boot": boot_id(), "silent": silent})


def recall(name: HypervisorName, kernel_digest: str) -> str | None:
    """Why not to try it again before the host boots again; None: nothing is known."""
    return _silent().get(_key(name, kernel_digest))


def _silent() -> dict[str, str]:
    value = read_json(_path()) or {}
    silent = value.get("silent")
    if value.get("boot") != boot_id() or not isinstance(silent, dict):
        return {}
    return {str(key): str(reason) for key, reason in silent.items()}


def _key(name: HypervisorName, kernel_digest: str) -> str:
    return f"{name} {kernel_digest[:32]}"


def _path() -> str:
    # A home directory is shared between hosts.
    return os.path.join(cache_home(), f"silent-{os.uname().nodename}.json")
