"""Where the job comes from: the first source that answers wins.

Our launcher always gives a config drive.  A guest that is booted by anything else takes the
kernel command line's words (`apppot.job=`, the original's `apppot.uid=` and the like, and the
command after `--`), a config drive that it finds, then the scripts `apppot-run` in the job
directory and `apppot-autorun` in the image, then a shell.
"""

from __future__ import annotations

import os
from binascii import Error as Base64Error
from binascii import a2b_base64

from apppot.guest.protocol.drive import DriveError, read_job
from apppot.guest.protocol.job import HOME, JOB_DIR, Job, JobError, Layer

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Iterable

# Words that the kernel itself puts behind the command line of User-Mode Linux.
_KERNEL_APPENDS = (b"console=tty0",)
AUTORUN = (f"{HOME}/apppot-autorun", "/usr/bin/apppot-autorun", "/apppot-autorun")


class CommandLine:
    """The kernel's command line: `words` name=value before the `--`, `command` after it."""

    def __init__(self, text: bytes) -> None:
        before, _, after = text.strip().partition(b" -- ")
        self.command = after.split()
        while self.command and self.command[-1] in _KERNEL_APPENDS:
            self.command.pop()
        self.words: dict[str, bytes] = {}
        for word in before.split():
            name, _, value = word.partition(b"=")
            self.words[os.fsdecode(name)] = value

    @classmethod
    def of_this_kernel(cls) -> CommandLine:
        """What this kernel was started with (/proc/cmdline)."""
        with open("/proc/cmdline", "rb") as text:
            return cls(text.read())

    def channel(self) -> str | None:
        """The channel's device, where a launcher waits at its other end."""
        value = self.words.get("apppot.channel")
        return None if value is None else os.fsdecode(value)


def find_job(line: CommandLine) -> Job:
    """The job of this guest.  Raises JobError or DriveError when a named source is broken."""
    if "apppot.drive" in line.words:
        return Job.load(read_job(os.fsdecode(line.words["apppot.drive"])))
    if "apppot.job" in line.words:
        return Job.load(_decode_word(line.words["apppot.job"]))
    if line.command or any(name in line.words for name in _ORIGINAL):
        return original_job(line)
    drive = _find_drive(_block_devices())
    if drive is not None:
        return Job.load(read_job(drive))
    return Job(run_scripts=True)


def _decode_word(word: bytes) -> bytes:
    standard = word.replace(b"-", b"+").replace(b"_", b"/")
    try:
        return a2b_base64(standard + b"=" * (-len(standard) % 4))
    except Base64Error as error:
        raise JobError(f"apppot.job= is not base64url: {error}") from error


def _block_devices() -> Iterable[str]:
    for name in sorted(os.listdir("/sys/class/block") if os.path.isdir("/sys/class/block") else []):
        yield f"/dev/{name}"


def _find_drive(devices: Iterable[str]) -> str | None:
    for device in devices:
        try:
            read_job(device)
        except (DriveError, OSError):
            continue
        return device
    return None


_ORIGINAL = ("apppot.uid", "apppot.gid", "apppot.user", "apppot.jobdir", "apppot.changes")


def original_job(line: CommandLine) -> Job:
    """The job in the words of the original AppPot; `-- command` is what it runs."""
    words = line.words
    try:
        uid = int(words.get("apppot.uid", b"1000"))
        gid = int(words.get("apppot.gid", b"1000"))
    except ValueError as error:
        raise JobError(f"apppot.uid= and apppot.gid= take numbers: {error}") from error
    env = {b"TERM": words.get("TERM", b"linux")}
    if "apppot.tmpdir" in words:
        env[b"TMPDIR"] = words["apppot.tmpdir"]
    changes = words.get("apppot.changes")
    layers = [Layer(source=changes, fstype="squashfs")] if changes else []
    return Job(
        argv=line.command,
        env=env,
        uid=uid,
        gid=gid,
        user=os.fsdecode(words.get("apppot.run_as", b"user")),
        job_dir=words.get("apppot.jobdir"),
        layers=layers,
        run_scripts=not line.command,
    )


def scripts(root: str) -> list[str]:
    """The job scripts that exist below `root`, in the order in which the first one runs."""
    candidates = (f"{JOB_DIR}/apppot-run", *AUTORUN)
    return [path for path in candidates if os.access(root + path, os.X_OK | os.R_OK)]
