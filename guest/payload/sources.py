"""Where the job comes from: the first source that answers wins.

Our launcher always gives a config drive.  A guest that is booted by anything else takes the
kernel command line's words (`apppot.job=`, the original's `apppot.uid=` and the like, and the
command after `--`), a config drive that it finds (ours; the two of clouds are read by
`configdrive`), a metadata service (`metadata`), then the scripts `apppot-run` in the job
directory and `apppot-autorun` in the image, then a shell.
"""

from __future__ import annotations

import os
from binascii import Error as Base64Error
from binascii import a2b_base64

from apppot.guest.protocol.drive import DriveError, read_job
from apppot.guest.protocol.job import HOME, JOB_DIR, USER, Job, JobError, Layer, Mount

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from collections.abc import Iterable

# User-Mode Linux puts this behind the command line that names no console.
_KERNEL_APPENDS = b" console=tty0"
# The word that says that the root is a partition of one of our bootable disks.
DISK_WORD = "apppot.disk"
AUTORUN = (f"{HOME}/apppot-autorun", "/usr/bin/apppot-autorun", "/apppot-autorun")


class CommandLine:
    """The kernel's command line: `words` name=value before the `--`, `command` after it.

    `consoles` are the kernel's consoles by name, the preferred one last.
    """

    def __init__(self, text: bytes) -> None:
        before, _, after = (b" " + text.strip() + b" ").partition(b" -- ")
        self.consoles = [os.fsdecode(word[8:]).split(",")[0] for word in _consoles(before)]
        if not self.consoles:
            self.consoles = ["tty0"]
            after = (b" " + after.strip()).removesuffix(_KERNEL_APPENDS)
        self.command = split_words(after)
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


def _consoles(words: bytes) -> list[bytes]:
    return [word for word in words.split() if word.startswith(b"console=")]


def split_words(text: bytes) -> list[bytes]:
    """The words of a command; quoted as in a shell, since the original's launcher quotes all.

    Quotes that do not close are taken as they stand.
    """
    if not any(quote in text for quote in (b"'", b'"', b"\\")):
        return text.split()
    # Not on the boot path of our own launcher, which sends no command this way.
    import shlex

    try:
        return [os.fsencode(word) for word in shlex.split(os.fsdecode(text))]
    except ValueError:
        return text.split()


def find_job(line: CommandLine) -> Job | None:
    """The job in the command line or on a config drive of ours; None where there is none.

    Raises JobError or DriveError when a named source is broken.
    """
    if "apppot.drive" in line.words:
        return Job.load(read_job(os.fsdecode(line.words["apppot.drive"])))
    if "apppot.job" in line.words:
        return Job.load(_decode_word(line.words["apppot.job"]))
    if is_original(line):
        return original_job(line)
    drive = _find_drive(block_devices())
    if drive is None:
        return None
    # Not on the boot path of our own launcher, which names its drive.
    from apppot.guest.payload import userdata

    return userdata.described(read_job(drive))


def _decode_word(word: bytes) -> bytes:
    standard = word.replace(b"-", b"+").replace(b"_", b"/")
    try:
        return a2b_base64(standard + b"=" * (-len(standard) % 4))
    except Base64Error as error:
        raise JobError(f"apppot.job= is not base64url: {error}") from error


def block_devices() -> list[str]:
    """The disks and partitions that have a size, by name."""
    with open("/proc/partitions", encoding="ascii") as table:
        rows = [line.split() for line in table][2:]
    return sorted([f"/dev/{row[3]}" for row in rows if len(row) == 4])


def _find_drive(devices: Iterable[str]) -> str | None:
    for device in devices:
        try:
            read_job(device)
        except (DriveError, OSError):
            continue
        return device
    return None


_ORIGINAL = ("uid", "gid", "user", "group", "jobdir", "tmpdir", "changes")


def is_original(line: CommandLine) -> bool:
    """Whether the command line speaks the original AppPot's words."""
    return bool(line.command) or any(f"apppot.{name}" in line.words for name in _ORIGINAL)


def original_job(line: CommandLine) -> Job:
    """The job in the words of the original AppPot; `-- command` is what it runs.

    Job directory, /tmp and changes are paths of the host.  `apppot.group=`, a name for the gid,
    changes nothing: the group of the account is called as it is.
    """
    words = line.words
    try:
        uid = int(words.get("apppot.uid", b"1000"))
        gid = int(words.get("apppot.gid", b"1000"))
    except ValueError as error:
        raise JobError(f"apppot.uid= and apppot.gid= take numbers: {error}") from error
    temporary = words.get("apppot.tmpdir")
    return Job(
        argv=line.command,
        env={b"TERM": words.get("TERM", b"linux")},
        uid=uid,
        gid=gid,
        user=os.fsdecode(words.get("apppot.user", USER.encode())),
        job_dir=words.get("apppot.jobdir") or None,
        mounts=[Mount(source=temporary, target=b"/tmp")] if temporary else [],
        layers=_changes(words.get("apppot.changes")),
        run_scripts=True,
    )


def _changes(value: bytes | None) -> list[Layer]:
    """The original's changes file: a path of the host, or a block device."""
    if not value:
        return []
    if value.startswith(b"/dev/"):
        return [Layer(source=value, fstype="squashfs")]
    return [Layer(source=value, fstype="file")]


def scripts(root: str) -> list[str]:
    """The job scripts that exist below `root`, in the order in which the first one runs."""
    candidates = (f"{JOB_DIR}/apppot-run", *AUTORUN)
    return [path for path in candidates if os.access(root + path, os.X_OK | os.R_OK)]
