"""Commands of ours in a guest: the words of the launcher, and what is made of its failure."""

from __future__ import annotations

import pytest
from apppot.host.commands.options import wish
from apppot.host.commands.table import build_parser
from apppot.host.common.errors import ApppotError
from apppot.host.process import launcher
from apppot.host.process.launcher import GuestCommand, GuestCommandError


def test_every_field_reaches_the_wish() -> None:
    command = GuestCommand(
        "base:1",
        ("-x", "a b"),
        memory="1G",
        scratch="2G",
        hypervisor="uml",
        network=True,
        job_dir="/tmp",
        binds=("/etc:/data:ro",),
        changes=("one.changes", "two.changes"),
        session="dev",
        env=("A=1",),
        workdir="/w",
        stdin=True,
        neutral=True,
        in_pot=True,
        bare=True,
    )
    asked = wish(build_parser("run").parse_args(command.argv()[len(launcher.LAUNCHER) :]))
    assert (asked.image, asked.argv) == ("base:1", (b"-x", b"a b"))
    options = asked.options
    assert (options.memory, options.scratch, options.hypervisor) == ("1G", "2G", "uml")
    assert (options.network, options.job_dir, options.user) == ("user", "/tmp", "root")
    assert [(bind.source, bind.target, bind.read_only) for bind in asked.binds] == [
        ("/etc", "/data", True)
    ]
    assert (asked.changes, asked.session) == (("one.changes", "two.changes"), "dev")
    assert (asked.env, asked.workdir, asked.entrypoint) == ({b"A": b"1"}, "/w", ())
    assert (asked.stdin, asked.neutral, asked.in_pot, asked.tty) == (True, True, True, False)


def test_by_default_it_has_nothing_of_the_caller() -> None:
    words = GuestCommand("host", ("true",)).argv()[len(launcher.LAUNCHER) :]
    asked = wish(build_parser("run").parse_args(words))
    assert (asked.stdin, asked.options.network, asked.options.job_dir) == (False, "none", "none")
    assert (asked.neutral, asked.in_pot, asked.entrypoint, asked.binds) == (False, False, None, ())


@pytest.mark.parametrize(
    ("status", "said", "cause", "hint"),
    [
        (125, "apppot: no image 'x'\n  remedy: name one", "no image 'x'", "name one"),
        (125, "apppot: warning: slow\napppot: it hangs\n  remedy: wait", "it hangs", "wait"),
        (3, "changes: a.tar is damaged", "changes: a.tar is damaged", ""),
        (1, "", "it ended with status 1", ""),
    ],
)
def test_failure(status: int, said: str, cause: str, hint: str) -> None:
    error = launcher._failure(status, said)
    assert isinstance(error, GuestCommandError)
    assert (error.status, error.cause, error.hint) == (status, cause, hint)


def test_what_the_launcher_prints_of_an_error_is_read_back() -> None:
    error = launcher._failure(125, "apppot: " + str(ApppotError("one\n    two", "do this")))
    assert (error.cause, error.hint) == ("one\n    two", "do this")
