"""Build a base image from a recipe: mmdebstrap's tar goes straight into squashfs."""

from __future__ import annotations

import getpass
import hashlib
import io
import os
import platform
import re
import shlex
import shutil
import sys
import tarfile
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum

from apppot.host.common import paths
from apppot.host.common.errors import ApppotError, BuildError, ImageError
from apppot.host.common.progress import Progress
from apppot.host.images import pack, store
from apppot.host.images.building import apt, steps
from apppot.host.images.building import recipe as recipes
from apppot.host.images.building.guest_build import SCRIPT
from apppot.host.images.building.recipe import Recipe, RecipeFile
from apppot.host.images.digests import digest_of
from apppot.host.images.record import HOST_IMAGE, Image, Record, check_name
from apppot.host.images.resolve import resolve
from apppot.host.images.workspace import user_store, workspace
from apppot.host.process import run as process
from apppot.host.process.launcher import GuestCommand, stream

# Part of the cache key: raise it when the way of building changes the result.
BUILDER_VERSION = 3
# Compiled in the image, which may be read-only when it boots.  The agent never changes there, so
# no start compares it with its source.
COMPILE_AGENT = (
    'PYTHONHASHSEED=0 chroot "$1" python3 -m compileall -q '
    "--invalidation-mode unchecked-hash /usr/lib/apppot"
)
COMPILE_IN_GUEST = COMPILE_AGENT.replace('chroot "$1" ', "")
INSTALL_HINT = "apt-get install mmdebstrap squashfs-tools"
MERGED_USR_HOOK = "/usr/share/mmdebstrap/hooks/merged-usr"
# Root's build mounts /proc and /sys in its tree: in a namespace of its own these vanish with it
# even when it is killed, and a later `rm -r` of the tree cannot reach the host's.
PRIVATE_MOUNTS = ("unshare", "--mount", "--propagation", "private", "--")
# Where a guest that builds sees the build's working directory.
GUEST_WORK = "/mnt/apppot-work"
PIN_FILE = "etc/apt/preferences.d/apppot-build"
# What the build needs and the image must not keep: the machine's name, resolver and proxy.
BUILD_ONLY = (
    "etc/resolv.conf",
    "etc/hostname",
    "etc/apt/apt.conf.d/99mmdebstrap",
    "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
    PIN_FILE,
    "var/cache/apt/archives/lock",
)
# Thousandths of the bar at which the essential packages, the others and packing end.
PHASE_ENDS = (350, 800)
PACKED = 1000
COUNT_LINE = re.compile(r"\d+ upgraded, (\d+) newly installed")
STEP_LINE = re.compile(r"(Unpacking|Setting up) (\S+)")


class BuildMode(StrEnum):
    """How mmdebstrap gets the right to create files of other owners."""

    ROOT = "root"
    UNSHARE = "unshare"
    GUEST = "guest"  # as root of a virtual machine on the host's own system

    @property
    def word(self) -> str:
        """mmdebstrap's own word for it."""
        return "root" if self is BuildMode.GUEST else self.value


def build(recipe: Recipe, name: str = "", *, force: bool = False) -> tuple[Record, bool]:
    """Build `recipe` into the user's store under its own name or `name` (NAME[:VERSION]).

    Returns the image's record and whether it was there already: the same recipe on the same
    state of the package archive, or on the same parent, is not built again unless `force`.
    Raises BuildError.
    """
    if recipe.parent:
        return _build_on_parent(recipe, name, force=force)
    label, version = _label(recipe, name)
    keyring = apt.keyring()
    lines = [
        source.line(keyring)
        for source in apt.sources(recipe.suite, recipe.mirror, recipe.components)
    ]
    state = _archive_state(lines)
    key = cache_key(recipe, lines, state)
    known = None if force else store.find_build(key)
    if known is not None:
        store.tag(user_store(), label, version, known.digest)
        return known, True
    mode = choose_mode()
    epoch = state.epoch if recipe.epoch is None else recipe.epoch
    with workspace() as folder:
        image = os.path.join(folder, "image")
        _bootstrap(recipe, lines, mode, epoch, folder, image)
        if recipe.run:
            image = _with_steps(recipe, image, epoch, os.path.join(folder, "stepped"))
        record = store.add(image, _record(recipe, label, version, image))
    store.remember_build(key, record.digest)
    return record, False


def _with_steps(recipe: Recipe, base: str, epoch: int, target: str) -> str:
    """Do the recipe's steps on the image file `base`; the path of the result."""
    found = resolve(base)
    steps.build(found, (), b"", recipe.run, epoch, target, f"building {recipe.name}: steps")
    return target


def _build_on_parent(recipe: Recipe, name: str, *, force: bool) -> tuple[Record, bool]:
    label, version = _label(recipe, name)
    parent = _parent(recipe.parent)
    digest = digest_of(parent)
    inputs = (BUILDER_VERSION, SCRIPT, recipe.inputs(), digest)
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()
    known = None if force else store.find_build(key)
    if known is not None:
        store.tag(user_store(), label, version, known.digest)
        return known, True
    epoch = steps.epoch_of(parent) if recipe.epoch is None else recipe.epoch
    files = files_tar(recipe.files, epoch) if recipe.files else b""
    run = (*((COMPILE_IN_GUEST,) if recipe.embed_agent else ()), *recipe.run)
    with workspace() as folder:
        image = os.path.join(folder, "image")
        title = f"building {recipe.name}"
        steps.build(parent, recipe.packages, files, run, epoch, image, title)
        own = _record(recipe, label, version, image)
        record = store.add(image, _inherited(own, parent.record, digest))
    store.remember_build(key, record.digest)
    return record, False


def _parent(reference: str) -> Image:
    """The parent image; built first where it is a recipe's and not there yet."""
    try:
        return resolve(reference)
    except ImageError as missing:
        try:
            own = recipes.load(reference)
        except ApppotError:
            raise missing from None
    build(own)
    return resolve(reference)


def _inherited(own: Record, parent: Record | None, digest: str) -> Record:
    """A child's record: what its recipe does not say is its parent's."""
    if parent is None:
        return replace(own, parent=digest)
    return replace(
        own,
        parent=digest,
        command=own.command or parent.command,
        # Another command is not meant for the parent's entrypoint.
        entrypoint=() if own.command else parent.entrypoint,
        env={**parent.env, **own.env},
        workdir=own.workdir or parent.workdir,
        user=own.user or parent.user,
    )


def _label(recipe: Recipe, name: str) -> tuple[str, str]:
    label, _, version = name.partition(":")
    label, version = label or recipe.name, version or recipe.version
    check_name(label, version)
    return label, version


def cache_key(recipe: Recipe, lines: Sequence[str], state: apt.ArchiveState) -> str:
    """A digest of all that decides about the image."""
    inputs = (BUILDER_VERSION, platform.machine(), recipe.inputs(), tuple(lines), state)
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


def _archive_state(lines: Sequence[str]) -> apt.ArchiveState:
    name = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return apt.archive_state(lines, os.path.join(paths.cache_home(), "apt", name))


def _record(recipe: Recipe, name: str, version: str, image: str) -> Record:
    return Record(
        digest="",
        name=name,
        version=version,
        format="squashfs",
        size=0,
        distribution=pack.distribution(image) or f"Debian {recipe.suite}".rstrip(),
        description=recipe.description,
        recipe=os.path.basename(recipe.path),
        command=recipe.command,
        env=dict(recipe.env),
        workdir=recipe.workdir,
        user=recipe.user,
    )


# --- the right to build ------------------------------------------------------------------------


def choose_mode() -> BuildMode:
    """How this caller can build; where user namespaces do not serve, in a virtual machine.

    Raises BuildError where mmdebstrap is missing.
    """
    if shutil.which("mmdebstrap") is None:
        raise BuildError("mmdebstrap is not installed", INSTALL_HINT)
    if os.geteuid() == 0:
        return BuildMode.ROOT
    problem = _unshare_problem()
    if problem is None:
        return BuildMode.UNSHARE
    sys.stderr.write(
        f"apppot: building in a virtual machine: {problem[0]}\n"
        f"  faster, but for the administrator: {problem[1]}\n"
    )
    return BuildMode.GUEST


def _unshare_problem() -> tuple[str, str] | None:
    """(what is missing, what the administrator can do) for a user namespace with many ids."""
    done = process.run(["unshare", "--user", "true"], check=False, timeout=30)
    if done.returncode:
        return "user namespaces are not allowed here", "ask for user.max_user_namespaces > 0"
    if shutil.which("newuidmap") is None:
        return "newuidmap is missing", "apt-get install uidmap"
    user = getpass.getuser()
    for path in ("/etc/subuid", "/etc/subgid"):
        if not _has_range(path, user):
            ranges = "--add-subuids 100000-165535 --add-subgids 100000-165535"
            return f"{path} gives {user} no ids", f"usermod {ranges} {user}"
    return None


def _has_range(path: str, user: str) -> bool:
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            owners = {line.split(":", 1)[0] for line in handle}
    except OSError:
        return False
    return bool(owners & {user, str(os.getuid())})


# --- mmdebstrap --------------------------------------------------------------------------------


def bootstrap_argv(
    recipe: Recipe, mode: BuildMode, options: str, lines: Iterable[str], extra: str, target: str
) -> list[str]:
    """mmdebstrap's command line.

    `options` is a file of apt options, `lines` the image's sources.list, `extra` a tar of the
    recipe's files ("" for none), `target` a FIFO that takes the tar.  In a guest, `target` is
    the folder that it shows at GUEST_WORK, and the tar goes to stdout.
    """
    # The pin keeps usrmerge, and with it perl, out of a tree that is merged from the start.
    pin = (
        'mkdir -p "$1/etc/apt/preferences.d"; '
        "printf 'Package: usrmerge\\nPin: release *\\nPin-Priority: -1\\n'"
        f' > "$1/{PIN_FILE}"'
    )
    clean = " ".join(f'"$1/{path}"' for path in BUILD_ONLY)
    argv = [
        *(() if mode is BuildMode.GUEST else _runner(mode, target)),
        *("mmdebstrap", "--verbose", f"--mode={mode.word}", "--variant=minbase", "--format=tar"),
        *(f"--aptopt={options}", "--dpkgopt=force-unsafe-io"),
        f"--include={','.join(('usr-is-merged', *recipe.packages))}",
        *(f"--hook-dir={MERGED_USR_HOOK}", f"--setup-hook={pin}"),
        f"--customize-hook=rm -f {clean}",
    ]
    if extra:
        argv.append(f"--customize-hook=tar-in {shlex.quote(extra)} /")
    if recipe.embed_agent:
        argv.append(f"--customize-hook={COMPILE_AGENT}")
    return [*argv, recipe.suite, "-", *lines]


def _runner(mode: BuildMode, target: str) -> tuple[str, ...]:
    """What executes mmdebstrap here, with its stdout where the tar goes."""
    return (
        # The FIFO is opened at the start, while it has a reader: an orphan that opened it at
        # the end would wait for ever; so it dies of its broken pipe, or of its parent's death.
        *("setpriv", "--pdeathsig", "TERM", "--"),
        *(PRIVATE_MOUNTS if mode is BuildMode.ROOT else ()),
        *("sh", "-c", 'exec "$@" >"$0"', target),
    )


def _bootstrap(
    recipe: Recipe, lines: Iterable[str], mode: BuildMode, epoch: int, folder: str, image: str
) -> None:
    options = os.path.join(folder, "apt.conf")
    _write_bytes(options, "".join(line + "\n" for line in apt.machine_options()).encode())
    extra = os.path.join(folder, "files.tar") if recipe.files else ""
    if extra:
        _write_bytes(extra, files_tar(recipe.files, epoch))
    # The namespace's root is another user outside: it must reach these files, and only these.
    os.chmod(folder, 0o711)
    if mode is BuildMode.GUEST:
        _bootstrap_in_guest(recipe, lines, epoch, folder, image)
        return
    fifo = os.path.join(folder, "fifo")
    os.mkfifo(fifo, 0o600)
    argv = bootstrap_argv(recipe, mode, options, lines, extra, fifo)
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8"}
    with Progress(f"building {recipe.name}", PACKED) as progress:
        watcher = BuildWatcher(progress)
        with pack.Packer(image, epoch, clamp=True) as packer:
            forward = _Forward(fifo, packer.writer)
            try:
                process.run_lines(argv, watcher.line, env=env, hint=INSTALL_HINT)
            except ApppotError as error:
                raise BuildError(error.cause, error.hint) from None
            finally:
                forward.finish()


def _bootstrap_in_guest(
    recipe: Recipe, lines: Iterable[str], epoch: int, folder: str, image: str
) -> None:
    extra = f"{GUEST_WORK}/files.tar" if recipe.files else ""
    options = f"{GUEST_WORK}/apt.conf"
    command = GuestCommand(
        HOST_IMAGE,
        tuple(bootstrap_argv(recipe, BuildMode.GUEST, options, lines, extra, folder)),
        memory=steps.MEMORY,
        scratch=steps.SCRATCH,
        network=True,
        binds=(f"{folder}:{GUEST_WORK}:ro",),
        env=("SOURCE_DATE_EPOCH", "LC_ALL"),
        workdir="/",
        neutral=True,
    )
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8"}
    with Progress(f"building {recipe.name} in a guest", PACKED) as progress:
        watcher = BuildWatcher(progress)
        try:
            with pack.Packer(image, epoch, clamp=True) as packer:
                stream(command, watcher.line, env=env, data=packer.writer)
        except ApppotError as error:
            raise BuildError(error.cause, error.hint) from None


class _Forward:
    """Moves mmdebstrap's tar from its FIFO into the packer's pipe, in a thread."""

    def __init__(self, fifo: str, target: int) -> None:
        # Non-blocking only for the open, which would otherwise wait for mmdebstrap; the
        # writing end held here keeps the stream open until `finish`.
        self._reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._writer = os.open(fifo, os.O_WRONLY | os.O_CLOEXEC)
        os.set_blocking(self._reader, True)
        self._target = target
        self._thread = threading.Thread(target=self._move, daemon=True)
        self._thread.start()

    def _move(self) -> None:
        try:
            pack.stream(self._target, lambda size: os.read(self._reader, size))
        except BrokenPipeError:
            pass  # the packer died; it reports why
        finally:
            os.close(self._reader)  # so that mmdebstrap does not wait for ever

    def finish(self) -> None:
        """Call when the writer has ended: waits until all is handed on."""
        os.close(self._writer)
        self._thread.join()


class BuildWatcher:
    """Turns mmdebstrap's lines into progress: two sets of packages, each unpacked and set up."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phase = -1
        self._steps = 0
        self._done = 0

    def line(self, text: str) -> None:
        """Take one line of output."""
        count = COUNT_LINE.match(text)
        if count and self._phase + 1 < len(PHASE_ENDS):
            self._phase += 1
            self._steps, self._done = max(1, 2 * int(count[1])), 0
        step = STEP_LINE.match(text)
        if step and self._phase >= 0:
            self._done += 1
            self._progress.update(self._position(), f"{step[1].lower()} {step[2]}")
        elif text.startswith("I: creating tarball"):
            self._progress.update(PHASE_ENDS[-1], "compressing")

    def _position(self) -> int:
        start = PHASE_ENDS[self._phase - 1] if self._phase else 0
        length = PHASE_ENDS[self._phase] - start
        return start + length * min(self._done, self._steps) // self._steps


def files_tar(files: Iterable[RecipeFile], epoch: int) -> bytes:
    """The recipe's files as a tar, all root's, with missing directories left to the image."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for file in files:
            member = tarfile.TarInfo(file.path.lstrip("/"))
            member.size, member.mode, member.mtime = len(file.content), file.mode, epoch
            member.uname = member.gname = "root"
            archive.addfile(member, io.BytesIO(file.content))
    return buffer.getvalue()


def _write_bytes(path: str, content: bytes) -> None:
    try:
        with open(path, "wb") as handle:
            handle.write(content)
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror}") from None
