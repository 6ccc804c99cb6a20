"""Tools that builds need, and which of them are missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

KERNEL_WORKS = "kernel build"
IMAGE_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "sqfstar": "squashfs-tools",
    "unsquashfs": "squashfs-tools",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "apt-get": "apt",
}
RUNTIME_TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "gcc": "gcc"}


def missing_tools() -> tuple[tuple[str, tuple[str, ...], str], ...]:
    images = dict(IMAGE_TOOLS)
    if os.getuid() != 0:
        images["newuidmap"] = "uidmap"
    return (
        *_kernel_tools(),
        ("runtime build", *_missing(RUNTIME_TOOLS)),
        ("image build", *_missing(images)),
    )


def _kernel_tools() -> list[tuple[str, tuple[str, ...], str]]:
    """What the kernel's recipe names; nothing where the recipes are not installed."""
    from apppot.host.common.errors import BuildError
    from apppot.host.pot.recipes import load_kernel

    try:
        recipe = load_kernel()
    except BuildError:
        return []
    missing = tuple(tool for tool in recipe.tools if shutil.which(tool) is None)
    remedy = f"apt-get install {recipe.packages}, or bring a pot with `apppot pot import FILE.tar`"
    return [(KERNEL_WORKS, missing, remedy)]


def _missing(tools: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
    missing = tuple(tool for tool in tools if shutil.which(tool) is None)
    packages = " ".join(sorted({tools[tool] for tool in missing}))
    return missing, f"apt-get install {packages}"
