"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Tests speak of the tree that they are in, whatever is configured for the user who runs them.
for _name in [name for name in os.environ if name.startswith("APPPOT_")]:
    if _name not in ("APPPOT_POT", "APPPOT_SITE_STORE", "APPPOT_RECIPES", "APPPOT_X86_KERNEL"):
        del os.environ[_name]
