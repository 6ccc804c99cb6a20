"""Where the pot's kernel and runtime are, and what the kernel can do.

On the launcher's way to the hypervisor: imports os, json and dataclasses only
(and contextlib, which dataclasses brings along).  What needs a
process (an unknown kernel) is in `probe`, imported when it is needed, its answer cached.

    POT/pot.json                        what is current
    POT/kernel/<digest>/linux           POT/runtime/<digest>/runtime.ext4
    POT/kernel-x86_64/<digest>/vmlinux and bzImage
"""

from __future__ import annotations

import os
from contextlib import suppress

from apppot.host.common.errors import PotError
from apppot.host.common.files import read_json, write_json
from apppot.host.common.frozen import frozen
from apppot.host.common.paths import cache_home, pot_homes

MANIFEST = "pot.json"
# Kernel as the user calls it -> its kind, which is its key in the manifest and its folder.
KINDS = {"uml": "kernel", "x86_64": "kernel-x86_64"}
BUILD_HINT = "build it with `apppot pot build`, or bring one with `apppot pot import FILE.tar`"
X86_HINT = (
    "build it with `apppot kernel build x86_64`, or bring one with `apppot pot import FILE.tar`"
)
KERNEL_HINT = "`apppot pot build` builds a kernel that starts ten times faster"
STOCK_KERNELS = ("linux.uml", "linux")
STOCK_MODULES = "/usr/lib/uml/modules"
# Of what `probe_kernel` finds: raise it when it finds more.
FACTS_VERSION = 2


@frozen
class Kernel:
    """A User-Mode Linux kernel.  `features` are words of its command line that it knows.

    `tuned`: one of ours, with every driver built in and the patches that keep data safe.
    `modules` is the host directory with its modules, for one that needs some; `libraries` the
    files that its dynamic loader opens.
    """

    path: str
    release: str
    digest: str
    tuned: bool
    features: frozenset[str]
    modules: str | None
    libraries: tuple[str, ...] = ()


@frozen
class MachineKernel:
    """The x86-64 kernel, for guests of QEMU, KVM and Xen, and for exported disks.

    `vmlinux` is booted directly (`features`: "pvh", "xen"), `bzimage` by firmware and boot
    loaders.  `digest` is that of `vmlinux`.
    """

    vmlinux: str
    bzimage: str
    release: str
    digest: str
    features: frozenset[str]


@frozen
class Pot:
    """What the launcher brings along: a kernel, and the runtime as a file system image."""

    kernel: Kernel
    runtime: str
    runtime_digest: str


def find_pot(kernel: str | None = None) -> Pot:
    """The pot, each part from the first place that has one, with the kernel file `kernel`.

    Without a kernel in the pot, Debian's stock user-mode-linux on PATH is taken.  Raises
    PotError where kernel or runtime are missing or damaged.
    """
    runtime, digest = _runtime()
    return Pot(find_kernel(kernel), runtime, digest)


def find_kernel(kernel: str | None = None) -> Kernel:
    """The kernel that `find_pot` would take; raises PotError where there is none."""
    if kernel is not None:
        return _probed(kernel)
    found = holding(KINDS["uml"])
    if found is not None:
        root, entry = found
        return _tuned(os.path.join(root, str(entry["path"])), entry)
    stock = stock_kernel()
    if stock is None:
        raise PotError("there is no kernel in the pot, and no user-mode-linux", BUILD_HINT)
    return _probed(stock)


def find_x86_kernel() -> MachineKernel:
    """The pot's x86-64 kernel; raises PotError where it is missing or damaged."""
    found = holding(KINDS["x86_64"])
    if found is None:
        raise PotError(f"there is no x86-64 kernel in the pot {_places()}", X86_HINT)
    root, entry = found
    vmlinux = os.path.join(root, str(entry["path"]))
    bzimage = os.path.join(os.path.dirname(vmlinux), "bzImage")
    for path in (vmlinux, bzimage):
        if not os.access(path, os.R_OK):
            raise PotError(f"the pot's x86-64 kernel {path} is missing or unreadable", X86_HINT)
    release, digest = str(entry["release"]), str(entry["digest"])
    return MachineKernel(vmlinux, bzimage, release, digest, _features(entry))


def _features(entry: dict[str, object]) -> frozenset[str]:
    words = entry.get("features")
    return frozenset(str(word) for word in words) if isinstance(words, list) else frozenset()


def find_runtime() -> str:
    """The pot's runtime, an image file.  Raises PotError where it is missing."""
    return _runtime()[0]


def holding(name: str) -> tuple[str, dict[str, object]] | None:
    """The first pot whose manifest has an entry of the kind `name`, and that entry; else None.

    Its files may be missing.  Pots behind it are not looked at.  Raises PotError where the
    manifest of one before it is damaged.
    """
    for root in pot_homes():
        entry = _entry(_manifest(root), name)
        if entry is not None:
            return root, entry
    return None


def _places() -> str:
    """Where a pot was looked for, in words."""
    first, *others = pot_homes()
    return first + "".join(f", nor in {home}" for home in others)


def _manifest(root: str) -> dict[str, object]:
    path = os.path.join(root, MANIFEST)
    manifest = read_json(path)
    if manifest is None and os.path.exists(path):
        raise PotError(f"{path} is damaged or of another version of AppPot", BUILD_HINT)
    return manifest or {}


def _entry(manifest: dict[str, object], name: str) -> dict[str, object] | None:
    entry = manifest.get(name)
    return entry if isinstance(entry, dict) and isinstance(entry.get("path"), str) else None


def _runtime() -> tuple[str, str]:
    found = holding("runtime")
    if found is None:
        raise PotError(f"there is no runtime in the pot {_places()}", BUILD_HINT)
    root, entry = found
    path = os.path.join(root, str(entry["path"]))
    if not os.access(path, os.R_OK):
        raise PotError(f"the pot's runtime {path} is missing or unreadable", BUILD_HINT)
    return path, str(entry["digest"])


def _tuned(path: str, entry: dict[str, object]) -> Kernel:
    if not os.access(path, os.X_OK):
        raise PotError(f"the pot's kernel {path} is missing or not executable", BUILD_HINT)
    release, digest = str(entry["release"]), str(entry["digest"])
    return Kernel(path, release, digest, True, _features(entry), None)


def stock_kernel() -> str | None:
    """Debian's kernel on PATH (package user-mode-linux), or None."""
    for name in STOCK_KERNELS:
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
            path = os.path.join(folder, name)
            if folder and os.path.isfile(path) and os.access(path, os.X_OK):
                return path
    return None


def _probed(path: str) -> Kernel:
    """What a kernel file that is not the pot's says of itself, from the cache where it can."""
    try:
        stat = os.stat(path)
    except OSError as error:
        hint = "name a User-Mode Linux kernel with --kernel, or leave it out for the pot's own"
        raise PotError(f"the kernel {path} cannot be used: {error.strerror}", hint) from error
    name = probe_key(os.path.realpath(path), stat.st_mtime_ns, stat.st_size)
    cached = os.path.join(cache_home(), "kernels", name)
    facts = read_json(cached)
    if facts is None:
        from apppot.host.pot.probe import probe_kernel

        facts = probe_kernel(path)
        _keep(cached, facts)
    return kernel_from_facts(path, facts)


def kernel_from_facts(path: str, facts: dict[str, object]) -> Kernel:
    """A Kernel from what `probe_kernel` found; one that knows anon_around is one of ours."""
    features = _features(facts)
    release = str(facts["release"])
    modules = os.path.join(STOCK_MODULES, release)
    libraries = facts.get("libraries")
    return Kernel(
        path=os.path.abspath(path),
        release=release,
        digest=str(facts["digest"]),
        tuned="anon_around" in features,
        features=features,
        modules=modules if os.path.isdir(modules) else None,
        libraries=tuple(map(str, libraries)) if isinstance(libraries, list) else (),
    )


def probe_key(path: str, mtime_ns: int, size: int) -> str:
    """The name of the cached answer for one state of a kernel file."""
    return _hash(f"{path}\0{mtime_ns}\0{size}\0{FACTS_VERSION}") + ".json"


def _hash(text: str) -> str:
    # _sha256 is the C module under hashlib, whose import costs OpenSSL's start.
    try:
        from _sha256 import sha256  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha256
    return str(sha256(os.fsencode(text)).hexdigest())[:32]


def _keep(path: str, value: dict[str, object]) -> None:
    """Cache what was found; a host where that is not possible asks again each time."""
    with suppress(OSError):
        write_json(path, value)


def parse_lpj(console: str) -> int | None:
    """The calibrated loops per jiffy that a kernel printed; None where it did not."""
    # "… BogoMIPS (lpj=29138944)"; without `re`, which the launcher does not have.
    number, end, _ = console.partition(" BogoMIPS (lpj=")[2].partition(")")
    return int(number) if end and number.isdecimal() else None


def lpj_for(kernel: Kernel) -> int | None:
    """Loops per jiffy as measured for this kernel on this machine; None: not measured yet."""
    facts = read_json(_lpj_path(kernel.digest))
    value = facts.get("lpj") if facts else None
    return value if isinstance(value, int) and value > 0 else None


def remember_lpj(digest: str, value: int) -> None:
    """Keep what a boot of the kernel with this digest calibrated on this machine."""
    _keep(_lpj_path(digest), {"lpj": value})


def _lpj_path(digest: str) -> str:
    return os.path.join(cache_home(), "lpj", _hash(f"{digest}\0{_machine()}") + ".json")


def _machine() -> str:
    """What makes a machine calibrate as it does: its id, processor and nominal frequency."""
    # The first records suffice: all of /proc/cpuinfo takes milliseconds on a large host.
    records = _head("/proc/cpuinfo", 2048).splitlines()
    model = next((line for line in records if line.startswith("model name")), "")
    base = _head("/sys/devices/system/cpu/cpu0/cpufreq/base_frequency", 64)
    return "\0".join((_head("/etc/machine-id", 64), model, base))


def _head(path: str, size: int) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, size).decode(errors="replace").strip()
    except OSError:
        return ""
    finally:
        os.close(fd)
