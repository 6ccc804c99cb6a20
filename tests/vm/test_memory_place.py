"""Where the guest's memory lies, and what is said when a place cannot serve."""

from __future__ import annotations

import os

import pytest
from apppot.host.pot import layout

from tests.harness.vm import IMAGE, RELEASE, ROOT, Launcher

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="remounting /dev/shm needs root")

# In a mount namespace of its own, /dev/shm (and what $PLACES names) is mounted noexec.
NOEXEC = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'for p in $PLACES; do mount --bind "$p" "$p"; mount -o remount,bind,noexec "$p"; done;'
    # The launcher itself may lie in one of them.
    'mount --bind "$TREE" "$TREE"; mount -o remount,bind,exec "$TREE"; exec "$@"',
    "sh",
)
WORDS = ("--network", "none", IMAGE, "uname", "-r")


@needs_root
def test_bubblewrap_needs_no_place_of_the_host(apppot: Launcher) -> None:
    result = apppot(
        "--confine",
        "bubblewrap",
        *WORDS,
        wrap=NOEXEC,
        env={"PLACES": "/dev/shm", "TREE": str(ROOT)},
    )
    assert result.ok().decode().startswith(RELEASE)


@needs_root
def test_another_place_is_taken_with_a_warning(apppot: Launcher) -> None:
    """Without bubblewrap's own: /dev/shm allows no exec, /tmp is a disk here or a tmpfs."""
    env = {"PLACES": "/dev/shm", "TREE": str(ROOT)}
    result = apppot("--confine", "landlock", *WORDS, wrap=NOEXEC, env=env)
    assert result.status == 0
    assert result.out.decode().startswith(RELEASE)
    assert result.err == b"" or b"lies on a disk" in result.err


@needs_root
def test_no_place_at_all_is_an_error_with_a_remedy(apppot: Launcher) -> None:
    env = {"PLACES": "/dev/shm /tmp", "TMPDIR": "/tmp", "TREE": str(ROOT)}
    result = apppot("--confine", "landlock", *WORDS, wrap=NOEXEC, env=env)
    result.failed("no place for 512 MiB of guest memory", "noexec", "remedy", "bubblewrap")


@pytest.mark.stock
def test_a_stock_kernel_warns_of_max_map_count(apppot: Launcher) -> None:
    stock = layout.stock_kernel()
    if stock is None:
        pytest.skip("Debian's package user-mode-linux is not installed")
    result = apppot("--kernel", stock, "--mem", "1G", *WORDS)
    assert result.status == 0
    assert result.out.startswith(b"6.")
    assert b"vm.max_map_count" in result.err
    assert b"apppot kernel build" in result.err
