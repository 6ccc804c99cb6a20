"""Directories of the host in the guest: hostfs on User-Mode Linux, 9p or virtiofs elsewhere."""

from __future__ import annotations

from apppot.guest import syscalls

HOSTFS = "hostfs"
# Kind -> file system and options.  What the guest maps shared is written back; all else goes to the
# host at once, where others may look at it, and is read there, where others may have written
# (without `directio`, what others append reads as zero bytes).
_TAGGED = {
    "9p": ("9p", "trans=virtio,version=9p2000.L,msize=512000,cache=mmap,directio"),
    "xen9p": ("9p", "trans=xen,version=9p2000.L,msize=262144,cache=mmap,directio"),
    "virtiofs": ("virtiofs", None),
}
KINDS = (HOSTFS, *_TAGGED)


def mount(kind: str, source: bytes, target: str, flags: int) -> None:
    """Mount the host's directory `source`: a path for hostfs, the device's tag elsewhere."""
    if kind == HOSTFS:
        syscalls.mount("host", target, HOSTFS, flags, source)
    else:
        fstype, options = _TAGGED[kind]
        syscalls.mount(source, target, fstype, flags, options)
