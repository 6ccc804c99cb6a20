"""The trial boot of `apppot doctor --boot`."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from apppot.host.common.errors import ApppotError

if TYPE_CHECKING:
    from apppot.host.doctor.checks import Check
    from apppot.host.pot.layout import Kernel
    from apppot.host.runs.timeline import Step


def calibrate(kernel: Kernel, known: int | None) -> None:
    from apppot.host.pot.boot import measure_lpj

    if known is None:
        measure_lpj(kernel)


def boot(memory: str | None) -> tuple[Check, list[Step]]:
    """Start a guest on the host's own root; its verdict and its timeline."""
    from apppot.host.channel.outcome import exit_code
    from apppot.host.config.settings import Options
    from apppot.host.doctor.checks import Check, Mark
    from apppot.host.runs import timeline
    from apppot.host.runs.prepare import PreparedRun
    from apppot.host.runs.start import STARTED, run_first
    from apppot.host.runs.wish import Wish

    # The whole of a start and an end, without what an image or a network adds.
    options = Options(image="host", memory=memory, job_dir="none", network="none")
    asked = Wish("host", (b"true",), options, stdin=False, tty=False)
    try:
        with contextlib.ExitStack() as stack:
            record = run_first(PreparedRun(asked, stack))
        assert record.outcome is not None
        status = exit_code(record.outcome)
    except ApppotError as error:
        return Check("boot", Mark.FAIL, error.cause, error.hint), []
    steps = timeline.steps(record, STARTED)
    text = f"a guest with kernel {record.outcome.hello['release']} ran `true`"
    if status != 0:
        return Check("boot", Mark.FAIL, f"{text}: status {status}"), steps
    return Check("boot", Mark.OK, f"{text} after {_to_payload(steps):.0f} ms"), steps


def _to_payload(steps: list[Step]) -> float:
    """Milliseconds from the hypervisor's start to the payload's."""
    times = {step.name: step for step in steps}
    return 1000 * (times["payload"].start - times["start"].end)
