"""What a kernel file says of itself.  Runs it; `layout` keeps the answer."""

from __future__ import annotations

import hashlib
import mmap
import re

from apppot.host.errors import PotError
from apppot.host.process import ToolError, run

# Options in `linux --help` that the launcher cares for.
HELP_WORDS = re.compile(rb"^(seccomp|ncpus)=", re.MULTILINE)
# A boot option of the kernel proper, which --help does not list: the string is in the binary.
BINARY_WORDS = (b"anon_around",)


def probe_kernel(path: str) -> dict[str, object]:
    """Release, digest (hex sha256) and features of a User-Mode Linux kernel file.

    Raises PotError where it is not one.
    """
    hint = "give the path of a User-Mode Linux kernel for this processor"
    try:
        # --version prints the release and --help the options; neither boots.
        release = run([path, "--version"], timeout=20).stdout.decode(errors="replace").strip()
        help_text = run([path, "--help"], check=False, timeout=20)
    except ToolError as error:
        raise PotError(f"{path} does not run as a kernel: {error.cause}", hint) from error
    if not re.fullmatch(r"\d+\.\d+\S*", release):
        raise PotError(f"{path} is not a User-Mode Linux kernel", hint)
    features = set(HELP_WORDS.findall(help_text.stdout + help_text.stderr))
    digest, inside = _scan(path)
    words = sorted(word.decode() for word in features | inside)
    return {"release": release, "digest": digest, "features": words}


def _scan(path: str) -> tuple[str, set[bytes]]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        digest = hashlib.sha256(data).hexdigest()
        return digest, {word for word in BINARY_WORDS if data.find(word + b"=\0") >= 0}
