"""`apppot warm`: machines that have booted, kept for runs that resume from there."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from dataclasses import replace

from apppot.host.commands.options import machine_options, surroundings_options, wish
from apppot.host.common.errors import HypervisorError, UsageError
from apppot.host.runs.prepare import PreparedRun


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `warm`: those of the runs that are to resume."""
    parser.usage = f"{parser.prog} [OPTION]… IMAGE | --list | --rm IMAGE | --rm --all"
    machine_options(parser)
    surroundings_options(parser)
    add = parser.add_argument_group("machines that are kept").add_argument
    add("--list", action="store_true", help="list them")
    add("--rm", action="store_true", help="delete those of IMAGE, or --all")
    add("--all", action="store_true", help="with --rm: all")
    add("--json", action="store_true", help="with --list: as JSON")
    parser.add_argument("image", metavar="IMAGE", nargs="?", help="as for `apppot run`")
    # Nothing runs yet: no streams, no command.
    parser.set_defaults(
        func=main, argv=[], console=False, no_stdin=True, tty=False, in_pot=False, neutral=False,
        log=None,
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Keep a machine, list or delete some."""
    if args.list:
        return _list(args.json)
    if args.rm:
        return _remove(args.image, args.all)
    if args.image is None:
        raise UsageError("which image?", "apppot warm IMAGE, or apppot warm --list")
    for name in ("session", "name", "detach", "gpu"):
        if getattr(args, name):
            raise UsageError(f"--{name} is for runs", "leave it out: nothing runs yet")
    with contextlib.ExitStack() as stack:
        return _keep(args, stack)


def _keep(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    from apppot.host.common.units import format_size
    from apppot.host.machine import launch
    from apppot.host.warm import key
    from apppot.host.warm.machine import Keeping

    begun = time.monotonic()
    prepared = PreparedRun(wish(args), stack)
    plan = prepared.keepable()
    if reason := key.obstacle(plan):
        raise HypervisorError(
            f"no machine can be kept for this: {reason}",
            "warm start is for images on kvm and qemu (--hypervisor), without a disk of their own",
        )
    facts = {
        "image": args.image,
        "hypervisor": plan.hypervisor.name,
        "memory": plan.memory,
        "cpus": plan.cpus,
    }
    keeping = Keeping(plan, key.key(plan, prepared.request), facts, stack)
    early = replace(plan, job=key.early_job(plan.job))
    launch.run(early, start=keeping)
    seconds, size = time.monotonic() - begun, format_size(keeping.kept.size())
    print(f"{args.image} on {plan.hypervisor.name}: {size}, made in {seconds:.1f} s")
    return 0


def _list(as_json: bool) -> int:
    from apppot.host.common.text import printable
    from apppot.host.common.units import format_size
    from apppot.host.warm import store

    found = store.machines()
    if as_json:
        rows = [
            {
                "key": one.key,
                "image": one.image,
                "hypervisor": one.hypervisor,
                "memory": one.memory,
                "cpus": one.cpus,
                "size": one.size(),
                "created": one.created,
                "used": one.used(),
            }
            for one in found
        ]
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'KEY':12} {'IMAGE':24} {'ON':5} {'MEMORY':>9} {'CPUS':>4} {'SIZE':>9}  CREATED")
    for one in found:
        sizes = f"{format_size(one.memory):>9} {one.cpus:4} {format_size(one.size()):>9}"
        print(f"{one.key[:12]} {printable(one.image):24} {one.hypervisor:5} {sizes}  {one.created}")
    print(f"together {format_size(sum(one.size() for one in found))}")
    return 0


def _remove(image: str | None, everything: bool) -> int:
    from apppot.host.warm import store

    if (image is None) is not everything:
        raise UsageError("which machines?", "apppot warm --rm IMAGE, or apppot warm --rm --all")
    store.sweep()
    doomed = [one for one in store.machines() if everything or one.image == image]
    if not doomed and not everything:
        names = ", ".join(sorted({one.image for one in store.machines()})) or "none"
        raise UsageError(f"no machine is kept of {image}", f"machines of: {names}")
    for one in doomed:
        store.remove(one)
    return 0
