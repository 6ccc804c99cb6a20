"""A trial of one hypervisor: a lab that is up, the scenario suite in it, and what is left."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from apppot.host.common import paths

from tests.lab import guest
from tests.lab.image import ROOT, Parts
from tests.lab.machine import EXCHANGE, Kind, Lab, fingerprint
from tests.lab.report import Column
from tests.scenarios import images, suite
from tests.scenarios.runner import IMAGE, Result, build_proven

# On a machine that has much else to do.
UP_SECONDS = 1200
MONTH = 30 * 86400
# In the lab's own seconds, which KVM's counts as this machine does; and on a machine that others
# use too.
LIMIT = 600
SCENARIO_SECONDS = 900
SUITE = """
cd /lab/tree
. tests/lab/surroundings.sh
# An address that is not the loopback's, for what guests find on their network.
busybox ip address add {address}/32 dev lo
echo nameserver {address} >/etc/resolv.conf
echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start
exec {who} python3 -m tests.scenarios --hypervisor {kind} --limit {limit} --image {image} {also} \
    --proven /lab/exchange/proven --json /lab/exchange/results.json {names}
"""
ADDRESS = "192.0.2.1"
# It asks more of a base image than the suite does.
NETWORK = "--also tests/lab/network.txt"
# What guests must not leave behind.
LEFT = {
    Kind.KVM: "pgrep -a qemu-system; ls -d /dev/shm/apppot-* /tmp/apppot-*",
    Kind.XEN: (
        "xl list | tail -n +3; losetup -a; ls -d /run/apppot-xen/* /dev/shm/apppot-* /tmp/apppot-*;"
        "ls /sys/class/net | grep vif"
    ),
}
# Xen's tools are root's; QEMU with KVM is anybody's.
WHO = {Kind.KVM: "setpriv --reuid 1000 --regid 1000 --clear-groups", Kind.XEN: ""}


MUSL = "musl"


def shares() -> dict[str, Path]:
    """What a lab sees of the host, read-only."""
    return {"tree": ROOT, "pot": Path(paths.pot_home()), "site": Path(paths.data_home())}


def saved_state(kind: Kind, parts: Parts) -> Path:
    """The state of a lab that is up, made where it is missing: starting from it takes a second."""
    name = f"{kind.boots}-{fingerprint(kind, parts, shares())}"
    state = parts.kernel.parent / f"{name}.state"
    with images.alone("lab", f"{name}.lock") as cache:
        if not state.exists():
            _forget_old_states(cache)
            _tell(f"booting the {kind.boots} lab …")
            with Lab(kind, parts, shares(), limit=UP_SECONDS) as lab:
                lab.save(state)
        os.utime(state)
    return state


def _forget_old_states(cache: Path) -> None:
    """Remove those that nobody has started from for a month: each has the size of an image."""
    for state in cache.glob("*/*.state"):
        if time.time() - state.stat().st_mtime > MONTH:
            state.unlink(missing_ok=True)


def start(kind: Kind, parts: Parts) -> Lab:
    return Lab(kind, parts, shares(), limit=UP_SECONDS, saved=saved_state(kind, parts))


def run_suite(kind: Kind, parts: Parts, names: Sequence[str], base: str = IMAGE) -> Column:
    """Check the lab with a guest of its own, then run the suite in it, over the image `base`."""
    began = time.monotonic()
    with start(kind, parts) as lab:
        lab.exchange.chmod(0o777)
        place = provide(lab, base)
        checked = guest.check(lab, parts)
        _tell(f"{kind}: a guest without AppPot: {checked}")
        script = SUITE.format(
            who=WHO[kind.boots],
            kind=kind,
            limit=LIMIT,
            image=shlex.quote(place),
            also="" if base == MUSL else NETWORK,
            address=ADDRESS,
            names=" ".join(shlex.quote(name) for name in names),
        )
        scenarios = len(names) or len(suite.load()) + 1
        status = lab.run(script, limit=scenarios * SCENARIO_SECONDS)
        results = lab.exchange / "results.json"
        if not results.exists():
            return Column(kind, checked, f"status {status}", (), time.monotonic() - began)
        found = tuple(Result(**fields) for fields in json.loads(results.read_text()))
        left = bytearray()
        lab.run(f"({LEFT[kind.boots]}) 2>/dev/null", UP_SECONDS, left.extend)
        trouble = f"left behind:\n{left.decode(errors='replace')}" if left else ""
        return Column(kind, checked, trouble, found, time.monotonic() - began)


def provide(lab: Lab, base: str) -> str:
    """Put into the lab the program that looks around from inside, and the image where it is made.

    Returns what the image is called there.
    """
    if base != MUSL:
        build_proven(lab.exchange / "proven")
        return base
    with tempfile.TemporaryDirectory() as folder:
        musl = images.Musl(Path(folder))
        shutil.copy(musl.proven(), lab.exchange / "proven")
        made = Path(musl.image())
        shutil.copy(made, lab.exchange)
    return f"/lab/{EXCHANGE}/{made.name}"


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
