"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Tests speak of the tree that they are in, whatever is configured for the user who runs them.
for _name in [name for name in os.environ if name.startswith("APPPOT_")]:
    if _name not in ("APPPOT_POT", "APPPOT_SITE_STORE", "APPPOT_RECIPES"):
        del os.environ[_name]

# Under nohup, or in the background of a script, these are ignored, and would be by all that tests
# start.  A handler of one's own is not inherited.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

# How long one example takes says something about the machine, not about the code.
settings.register_profile("house", deadline=None)
settings.load_profile("house")
