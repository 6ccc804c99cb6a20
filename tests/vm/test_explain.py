"""`--explain` shows the very words that a start executes."""

from __future__ import annotations

import json

import pytest

from tests.harness.vm import IMAGE, Launcher
from tests.harness.words import comparable


@pytest.mark.parametrize(
    "options",
    [
        ("--hypervisor", "uml", "--confine", "bubblewrap"),
        ("--hypervisor", "uml", "--confine", "landlock"),
        ("--hypervisor", "uml", "--confine", "off", "--network", "none", "--scratch", "1G"),
        ("--hypervisor", "qemu", "--no-warm"),
        ("--hypervisor", "qemu", "--no-warm", "--confine", "landlock", "--job-files", "copy"),
    ],
)
def test_what_is_explained_is_executed(apppot: Launcher, options: tuple[str, ...]) -> None:
    bind = ("-v", "/etc:/mnt/etc:ro", *options)
    asked = ("-T", "--json", *bind, IMAGE, "true")
    explained = json.loads(apppot("--explain", *asked).ok())["argv"]
    done = apppot(*asked)
    assert done.status == 0, done
    executed = json.loads(done.err.splitlines()[-1])["argv"]
    assert comparable(explained, executed) == explained
