"""Settings of a run, each with where it came from.

Options > environment (`APPPOT_*`, then the batch system's allocation) > user's TOML > site's
TOML > defaults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from apppot.host.common.errors import UsageError
from apppot.host.common.units import parse_duration, parse_size
from apppot.host.config.allocation import BATCH
from apppot.host.confinement.sandbox import WISHES

DEFAULT_MEMORY = 512 << 20


@dataclass(frozen=True)
class Setting:
    """One resolved value and the name of its source, for --explain."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Rule:
    """How one setting is found: environment variable, TOML key, default, parser of texts."""

    variable: str | None
    default: Any
    parse: Callable[[str], Any]
    option: str = ""  # where it is not --NAME


def _memory(text: str) -> int:
    return parse_size(text, "M")


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise UsageError(f"{text!r} is not one of {', '.join(allowed)}")
        return text

    return parse


def _count(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) <= 16:
        raise UsageError(f"{text!r} is not a number of CPUs", "write a number from 1 to 16")
    return int(text)


RULES: dict[str, Rule] = {
    "image": Rule("APPPOT_IMAGE", None, str, "IMAGE"),
    "memory": Rule("APPPOT_MEM", DEFAULT_MEMORY, _memory, "--mem"),
    "cpus": Rule("APPPOT_CPUS", 1, _count),
    "kernel": Rule("APPPOT_KERNEL", None, str),
    "hypervisor": Rule("APPPOT_HYPERVISOR", "auto", _choice("auto", "uml", "kvm", "xen", "qemu")),
    "qemu_machine": Rule("APPPOT_QEMU_MACHINE", "auto", _choice("auto", "microvm", "q35")),
    "qemu_share": Rule("APPPOT_QEMU_SHARE", "auto", _choice("auto", "virtiofs", "9p", "none")),
    "xen_type": Rule("APPPOT_XEN_TYPE", "pv", _choice("pv", "pvh")),
    "network": Rule("APPPOT_NETWORK", "user", str),
    "confine": Rule("APPPOT_CONFINE", "auto", _choice(*WISHES)),
    "time": Rule("APPPOT_TIME", None, parse_duration),
    "scratch": Rule("APPPOT_SCRATCH", None, parse_size),
    "hostname": Rule("APPPOT_HOSTNAME", "apppot", str),
    "user": Rule("APPPOT_USER", "user", str),
    "job_dir": Rule("APPPOT_JOB_DIR", ".", str),
    "job_files": Rule("APPPOT_JOB_FILES", "auto", _choice("auto", "share", "copy")),
    "hello_timeout": Rule("APPPOT_HELLO_TIMEOUT", None, parse_duration),
    "log": Rule("APPPOT_LOG", None, str),
    "warm": Rule("APPPOT_WARM", "auto", _choice("auto", "off")),
    "repositories": Rule("APPPOT_REPOSITORIES", None, str),
}


def read_toml(paths: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """The configuration files that exist, as (path, values); unknown keys are errors."""
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
        unknown = sorted(set(values) - set(RULES))
        if unknown:
            raise UsageError(f"{path}: unknown key {unknown[0]!r}", f"known: {', '.join(RULES)}")
        found.append((path, values))
    return found


def resolve(
    options: Mapping[str, Any],
    env: Mapping[str, str] = os.environ,
    files: tuple[str, ...] = (),
) -> dict[str, Setting]:
    """Every setting of RULES, from `options` (None: not given), `env`, `files` and defaults.

    `files` are in order of rising precedence.  Raises UsageError naming the source of a value
    that makes no sense.
    """
    toml = read_toml(files)
    return {name: _resolve_one(name, rule, options, env, toml) for name, rule in RULES.items()}


def _resolve_one(
    name: str,
    rule: Rule,
    options: Mapping[str, Any],
    env: Mapping[str, str],
    toml: list[tuple[str, dict[str, Any]]],
) -> Setting:
    if options.get(name) is not None:
        return _parsed(rule, options[name], rule.option or f"--{name.replace('_', '-')}")
    if rule.variable is not None and env.get(rule.variable):
        return _parsed(rule, env[rule.variable], f"${rule.variable}")
    batch = BATCH[name](env) if name in BATCH else None
    if batch is not None:
        return Setting(batch, "batch allocation")
    for path, values in reversed(toml):
        if name in values:
            return _parsed(rule, values[name], path)
    return Setting(rule.default, "default")


def _parsed(rule: Rule, value: Any, origin: str) -> Setting:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise UsageError(f"{origin}: {value!r} is not a text or a number")
    try:
        return Setting(rule.parse(str(value)), origin)
    except UsageError as error:
        raise UsageError(f"{origin}: {error.cause}", error.hint) from error
