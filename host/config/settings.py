"""Settings of a run, each with where it came from.

Options > environment (`APPPOT_*`, then the batch system's allocation) > user's TOML > site's
TOML > defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, Generic, TypeVar

from apppot.host.common.errors import UsageError
from apppot.host.common.frozen import frozen
from apppot.host.common.units import parse_duration, parse_size
from apppot.host.config.allocation import MAX_CPUS, of_environment
from apppot.host.confinement.sandbox import WISHES

DEFAULT_MEMORY = 512 << 20

_Value_co = TypeVar("_Value_co", covariant=True)
_Value = TypeVar("_Value")


@frozen
class Setting(Generic[_Value_co]):
    """One resolved value and the name of its source, for --explain."""

    value: _Value_co
    origin: str


@frozen
class Settings:
    """Everything that can be set, with the types that the rest of the launcher relies on."""

    image: Setting[str | None]
    memory: Setting[int]  # bytes
    cpus: Setting[int]
    kernel: Setting[str | None]  # a file
    hypervisor: Setting[str]
    qemu_machine: Setting[str]
    qemu_share: Setting[str]
    xen_type: Setting[str]
    network: Setting[str]
    confine: Setting[str]  # of WISHES
    time: Setting[float | None]  # seconds
    scratch: Setting[int | None]  # bytes
    hostname: Setting[str]
    user: Setting[str]
    job_dir: Setting[str]
    job_files: Setting[str]
    hello_timeout: Setting[float | None]  # seconds
    log: Setting[str | None]  # a file
    warm: Setting[str]
    repositories: Setting[str | None]

    def items(self) -> Iterator[tuple[str, Setting[object]]]:
        """Every setting with its name."""
        for field in fields(self):
            yield field.name, getattr(self, field.name)


@frozen
class Options:
    """Settings that are asked for, as a user writes them; None: not asked for.

    The names are those of Settings.
    """

    image: str | None = None
    memory: str | int | None = None
    cpus: str | int | None = None
    kernel: str | None = None
    hypervisor: str | None = None
    qemu_machine: str | None = None
    qemu_share: str | None = None
    xen_type: str | None = None
    network: str | None = None
    confine: str | None = None
    time: str | int | None = None
    scratch: str | int | None = None
    hostname: str | None = None
    user: str | None = None
    job_dir: str | None = None
    job_files: str | None = None
    hello_timeout: str | int | None = None
    log: str | None = None
    warm: str | None = None
    repositories: str | None = None


_NO_OPTIONS = Options()
# Where the option of a setting is not --NAME.
_OPTION_WORDS = {"image": "IMAGE", "memory": "--mem"}


def _memory(text: str) -> int:
    return parse_size(text, "M")


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise UsageError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def _count(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= MAX_CPUS:
        raise UsageError(
            f"{text!r} is not a number of CPUs", f"write a number from 1 to {MAX_CPUS}"
        )
    return int(text)


def read_toml(paths: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The configuration files that exist, as (path, values); unknown keys are errors."""
    known = [field.name for field in fields(Settings)]
    found = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                text = file.read()
        except OSError:
            continue
        # Imported only where there is a file: tomllib costs 5 ms.
        import tomllib

        try:
            values = tomllib.loads(text.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not TOML: {error}") from error
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UsageError(f"{path}: unknown key {unknown[0]!r}", f"known: {', '.join(known)}")
        found.append((path, values))
    return found


def resolve(
    options: Options = _NO_OPTIONS,
    env: Mapping[str, str] = os.environ,
    files: tuple[str, ...] = (),
) -> Settings:
    """Every setting, from `options`, `env`, `files` and defaults.

    `files` are in order of rising precedence.  Raises UsageError naming the source of a value
    that makes no sense.
    """
    find = _Sources(options, env, read_toml(files)).find
    batch = of_environment(env)
    return Settings(
        image=find("image", "APPPOT_IMAGE", None, str),
        memory=find("memory", "APPPOT_MEM", DEFAULT_MEMORY, _memory, batch.memory),
        cpus=find("cpus", "APPPOT_CPUS", 1, _count, batch.cpus),
        kernel=find("kernel", "APPPOT_KERNEL", None, str),
        hypervisor=find(
            "hypervisor",
            "APPPOT_HYPERVISOR",
            "auto",
            _choice("auto", "uml", "kvm", "xen", "qemu"),
        ),
        qemu_machine=find(
            "qemu_machine", "APPPOT_QEMU_MACHINE", "auto", _choice("auto", "microvm", "q35")
        ),
        qemu_share=find(
            "qemu_share", "APPPOT_QEMU_SHARE", "auto", _choice("auto", "virtiofs", "9p", "none")
        ),
        xen_type=find("xen_type", "APPPOT_XEN_TYPE", "pv", _choice("pv", "pvh")),
        network=find("network", "APPPOT_NETWORK", "user", str),
        confine=find("confine", "APPPOT_CONFINE", "auto", _choice(*WISHES)),
        time=find("time", "APPPOT_TIME", None, parse_duration),
        scratch=find("scratch", "APPPOT_SCRATCH", None, parse_size),
        hostname=find("hostname", "APPPOT_HOSTNAME", "apppot", str),
        user=find("user", "APPPOT_USER", "user", str),
        job_dir=find("job_dir", "APPPOT_JOB_DIR", ".", str),
        job_files=find("job_files", "APPPOT_JOB_FILES", "auto", _choice("auto", "share", "copy")),
        hello_timeout=find("hello_timeout", "APPPOT_HELLO_TIMEOUT", None, parse_duration),
        log=find("log", "APPPOT_LOG", None, str),
        warm=find("warm", "APPPOT_WARM", "auto", _choice("auto", "off")),
        repositories=find("repositories", "APPPOT_REPOSITORIES", None, str),
    )


@frozen
class _Sources:
    """Where settings come from, in order of falling precedence but for the files."""

    options: Options
    env: Mapping[str, str]
    files: list[tuple[str, dict[str, Any]]]

    def find(
        self,
        name: str,
        variable: str,
        default: _Value,
        parse: Callable[[str], _Value],
        allocated: _Value | None = None,
    ) -> Setting[_Value]:
        """The setting `name`; `allocated` is what a batch system gave."""
        asked = getattr(self.options, name)
        if asked is not None:
            option = _OPTION_WORDS.get(name, f"--{name.replace('_', '-')}")
            return _parsed(parse, asked, option)
        if text := self.env.get(variable):
            return _parsed(parse, text, f"${variable}")
        if allocated is not None:
            return Setting(allocated, "batch allocation")
        for path, values in reversed(self.files):
            if name in values:
                return _parsed(parse, values[name], path)
        return Setting(default, "default")


def _parsed(parse: Callable[[str], _Value], value: object, origin: str) -> Setting[_Value]:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise UsageError(f"{origin}: {value!r} is not a text or a number")
    try:
        return Setting(parse(str(value)), origin)
    except UsageError as error:
        raise UsageError(f"{origin}: {error.cause}", error.hint) from error
