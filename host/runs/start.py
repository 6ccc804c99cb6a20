"""Start a run, on the first hypervisor whose guest says HELLO."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from apppot.host.runs.kernels import learn_calibration
from apppot.host.runs.prepare import PreparedRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from apppot.host.machine.run import Run
    from apppot.host.runs.recorder import Recorder
    from apppot.host.warm.machine import Resuming
    from apppot.host.warm.store import Kept


STARTED = time.monotonic()


def run_first(prepared: PreparedRun, open_recorder: Callable[[], Recorder] | None = None) -> Run:
    """Run on the first hypervisor whose guest says HELLO; before that no payload has started."""
    from apppot.host.hypervisor import verdicts
    from apppot.host.machine import failure, launch

    while True:
        kept = prepared.kept()
        try:
            with contextlib.ExitStack() as stack:
                if kept is None:
                    return launch.run(prepared.plan, open_recorder)
                resuming = _resuming(kept, prepared, stack)
                return launch.run(resuming.plan, open_recorder, resuming)
        except failure.NoHello as error:
            if kept is not None:
                prepared.give_up(kept, error.reason)
                continue
            silent, digest = prepared.hypervisor, prepared.plan.kernel.digest
            if not prepared.next_hypervisor():
                raise
            verdicts.remember(silent.name, digest, error.reason)
            sys.stderr.write(
                f"apppot: warning: {silent.name}: {error.reason}; trying "
                f"{prepared.hypervisor.name}, also next time until this host boots again\n"
            )


def _resuming(kept: Kept, prepared: PreparedRun, stack: contextlib.ExitStack) -> Resuming:
    from apppot.host.machine.failure import NoHello
    from apppot.host.warm.machine import Resuming

    try:
        return Resuming(kept, prepared.keepable(), stack)
    except OSError as error:
        reason = f"the kept machine cannot be read: {error}"
        raise NoHello(reason, "", reason) from error


def conclude(record: Run) -> int:
    """The exit status of a run that has ended; tells the user what could not be executed."""
    from apppot.host.channel.outcome import complaint, exit_code

    assert record.outcome is not None
    if said := complaint(record.outcome):
        sys.stderr.write(f"apppot: {said}\n")
    status = exit_code(record.outcome)
    learn_calibration(record)
    return status
