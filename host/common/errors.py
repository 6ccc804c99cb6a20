"""Errors that a user sees: each names its cause and, where there is one, the remedy."""

from __future__ import annotations

EXIT_TIME_LIMIT = 124
EXIT_FAILED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_SIGNAL_BASE = 128


class ApppotError(Exception):
    """AppPot could not do what was asked; never the payload's own failure.

    `cause` is one sentence about what is wrong, `hint` what the user can do about it.
    """

    exit_code = EXIT_FAILED

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.cause}\n  remedy: {self.hint}" if self.hint else self.cause


class Aborted(Exception):
    """A signal ended the launcher before it let the guest go on, or after the payload had ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = EXIT_SIGNAL_BASE + number


class UsageError(ApppotError):
    """The command line or a configuration file is wrong."""


class Unsuited(UsageError):
    """The hypervisor that is planned for cannot do what is asked; another may."""


class ImageError(ApppotError):
    """An image is missing, damaged or of a kind that AppPot does not know."""


class PotError(ApppotError):
    """The kernel or the runtime is missing, damaged or of another version."""


class HypervisorError(ApppotError):
    """No hypervisor could start the virtual machine, or it died or hung."""


class BuildError(ApppotError):
    """A kernel, runtime or image could not be built."""


class RepositoryError(ApppotError):
    """A repository is unreachable, damaged, not trusted, or older than it was."""
