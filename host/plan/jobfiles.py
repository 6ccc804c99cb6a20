"""How the files of the job directory get into a guest and back: decided for the plan.  Pure.

The directory is shared where the hypervisor can; else, or where asked for, the guest gets a copy
and what is new in it comes back (`apppot.host.machine.inputs`, `apppot.host.channel.outputs`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from apppot.guest.protocol.job import JOB_DIR
from apppot.host.common.errors import Unsuited, UsageError
from apppot.host.common.frozen import frozen

if TYPE_CHECKING:
    from apppot.host.config.settings import Setting
    from apppot.host.plan.request import Findings, Request

_MOST_FOLLOWED = 32


@frozen
class JobFiles:
    """What is copied in, and what comes back: as paths below the job directory, or absolute."""

    copy: bool
    outputs: tuple[bytes, ...] = ()
    follow: tuple[bytes, ...] = ()

    def come_back(self) -> bool:
        """Whether the guest sends files at all."""
        return self.copy or bool(self.outputs or self.follow)


def plan_files(request: Request, setting: Setting[str], found: Findings) -> JobFiles:
    """What `request` asks for.  Raises UsageError for what cannot be had together.

    Unsuited where it is the hypervisor that cannot.
    """
    copy = setting.value == "copy" or (setting.value == "auto" and not found.hypervisor.share)
    asked = {"--input": request.inputs, "--output": request.outputs, "--follow": request.follow}
    if found.job_directory is None:
        for option in (option for option, values in asked.items() if values):
            raise UsageError(f"{option}: there is no job directory", "leave out --job-dir none")
        return JobFiles(copy=False)
    if setting.value == "share" and not found.hypervisor.share:
        raise Unsuited(
            f"{setting.origin}: {found.hypervisor.name} cannot share directories here",
            "--job-files copy",
        )
    if request.inputs and not copy:
        raise UsageError(
            "--input: the job directory is shared, all of it is there", "--job-files copy"
        )
    inputs, outputs, follow = [
        [_pattern(option, text) for text in values] for option, values in asked.items()
    ]
    if any(pattern.startswith(b"/") for pattern in inputs):
        raise UsageError("--input: only what lies in the job directory can be copied", "--bind")
    if not copy:
        for pattern in outputs:
            if not pattern.startswith(b"/"):
                raise UsageError(
                    f"--output {os.fsdecode(pattern)}: the job directory is shared, what is "
                    "written there is there",
                    "leave it out, name an absolute path of the guest, or use --job-files copy",
                )
        follow = [path for path in follow if path.startswith(b"/")]
    _check_names(follow)
    return JobFiles(copy, tuple(outputs), tuple(follow))


def _pattern(option: str, text: str) -> bytes:
    """`text` without what means nothing in a path, relative where it lies in the job directory."""
    path = os.path.normpath(os.path.join(JOB_DIR, text)) if text else ""
    if path.startswith(f"{JOB_DIR}/"):
        return os.fsencode(path[len(JOB_DIR) + 1 :])
    if not text.startswith("/") or path.strip("/") == "" or path == JOB_DIR:
        raise UsageError(
            f"{option} {text!r} names nothing in the job directory",
            "write a path relative to it, or an absolute one of the guest",
        )
    return os.fsencode("/" + path.lstrip("/"))


def _check_names(follow: list[bytes]) -> None:
    """Each followed file needs a name of its own here."""
    names = [path.rpartition(b"/")[2] if path.startswith(b"/") else path for path in follow]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--follow: two files would be {os.fsdecode(name)} on this host")
    if len(follow) > _MOST_FOLLOWED:
        raise UsageError(f"--follow: {len(follow)} files are more than {_MOST_FOLLOWED}")
