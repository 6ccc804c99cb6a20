"""The way of the original AppPot, to compare with: Debian with sysvinit on a writable disk.

The job is in rc.local, which writes when it begins, runs `true` and powers off; the kernel is
Debian's stock User-Mode Linux.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from apppot.host.common import paths
from apppot.host.images.building import builder, recipe
from apppot.host.images.resolve import resolve
from apppot.host.pot.layout import Kernel
from apppot.host.process.run import run

from benchmarks.machines import Bench
from benchmarks.measure import launch

# The packages of the base image `debian-12`, and an init.
RECIPE = """
packages = [
    "ca-certificates", "curl", "initscripts", "iproute2", "kmod", "less", "nano", "netbase",
    "procps", "sudo", "sysvinit-core", "tzdata", "udev", "xz-utils",
]

[base]
suite = "bookworm"

[image]
name = "bench-sysvinit"
version = "1"
description = "Debian 12 with sysvinit, to compare with"

[files]
"/etc/fstab" = "/dev/ubda / ext4 defaults,noatime 0 1\\n"
"/etc/rc.local" = { content = '''#!/bin/sh
mkdir -p /job
mount -t hostfs -o "$(sed 's/.*jobdir=\\([^ ]*\\).*/\\1/' /proc/cmdline)" job /job
: >/job/payload
true
/sbin/poweroff -f
''', mode = "0755" }
"""
SIZE = "2G"


def image(folder: Path) -> Path:
    """An ext4 disk with the system, built once (two minutes) and kept in the cache."""
    disk = Path(paths.cache_home()) / "bench" / "sysvinit.ext4"
    if disk.exists():
        return disk
    record, _ = builder.build(recipe.parse(RECIPE, "sysvinit.toml"))
    tree, new = folder / "sysvinit", disk.with_suffix(".new")
    source = resolve(f"sha256:{record.digest}").path
    disk.parent.mkdir(parents=True, exist_ok=True)
    run(
        ["unsquashfs", "-q", "-no-progress", "-d", tree, source],
        hint="apt-get install squashfs-tools",
    )
    # mke2fs keeps owners as they are in the tree: right only where root unpacked it.
    run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, new, SIZE],
        hint="apt-get install e2fsprogs",
    )
    os.replace(new, disk)
    return disk


def boot(given: Bench, kernel: Kernel, disk: Path) -> Mapping[str, float]:
    """One boot on a copy-on-write of `disk`: seconds to the payload, and to the end."""
    job = given.folder / "sysvinit-job"
    job.mkdir(exist_ok=True)
    cow, said = given.folder / "sysvinit.cow", job / "payload"
    for old in (cow, said):
        old.unlink(missing_ok=True)
    words = [kernel.path, "mem=512M", f"ubd0={cow},{disk}", "root=/dev/ubda", "rw"]
    words += ["con=null", "con0=null,fd:2", "ssl=null", f"uml_dir={given.folder}/"]
    begun = time.time()
    whole = launch([*words, f"jobdir={job}"], may_fail=True).seconds
    return {"payload": said.stat().st_mtime - begun, "whole": whole}
