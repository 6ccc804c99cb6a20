"""Signals of the launcher: which are the payload's, which are its own."""

from __future__ import annotations

import signal

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGALRM,
)
# What ends the launcher while the files of a payload that has ended come back.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
OWN = (signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH)
