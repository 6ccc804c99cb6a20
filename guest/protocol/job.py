"""The job description: what the payload is and what it needs.

Versioned JSON.  What may hold any bytes (arguments, environment, paths) travels as base64.
Plain classes instead of dataclasses: the guest reads this on its way to the payload.
"""

from __future__ import annotations

from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64

from .jsonlite import dumps, loads

TYPE_CHECKING = False  # of `typing`, whose import takes the guest 19 ms
if TYPE_CHECKING:
    from typing import Any

VERSION = 1

USER = "user"
HOME = "/home/user"
JOB_DIR = "/home/user/job"
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class JobError(ValueError):
    """A job description that cannot be understood."""


def _b64(value: bytes) -> str:
    return b2a_base64(value, newline=False).decode("ascii")


def _unb64(text: Any) -> bytes:
    try:
        return a2b_base64(text)
    except (Base64Error, TypeError, ValueError) as error:
        raise JobError(f"not base64: {text!r:.60}") from error


# Field -> how it is written.  "plain" is JSON as it stands, "bytes" one base64 string,
# "list" a list of them, "map" an object whose keys and values are pairs of them.
_PLAIN, _BYTES, _LIST, _PAIRS = "plain", "bytes", "list", "pairs"


class _Record:
    """A versioned set of fields, each with its default in the class."""

    FIELDS: dict[str, str] = {}

    def __init__(self, **values: Any) -> None:
        unknown = set(values) - set(self.FIELDS)
        if unknown:
            raise JobError(f"unknown field {sorted(unknown)[0]!r}")
        for name in self.FIELDS:
            default = getattr(type(self), name)
            if isinstance(default, (list, dict)):
                default = default.copy()
            setattr(self, name, values.get(name, default))

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {name: _encode(kind, getattr(self, name)) for name, kind in self.FIELDS.items()}

    @classmethod
    def from_json(cls, value: Any) -> Any:
        """The record that `to_json` gave; unknown fields are an error, missing ones default."""
        if not isinstance(value, dict):
            raise JobError(f"{cls.__name__} is not an object")
        unknown = set(value) - set(cls.FIELDS)
        if unknown:
            raise JobError(f"unknown field {sorted(unknown)[0]!r} in {cls.__name__}")
        return cls(**{name: _decode(cls.FIELDS[name], item) for name, item in value.items()})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__dict__!r})"


def _encode(kind: str, value: Any) -> Any:
    if value is None or kind == _PLAIN:
        return value
    if kind == _BYTES:
        return _b64(value)
    if kind == _LIST:
        return [_b64(item) for item in value]
    return [[_b64(key), _b64(item)] for key, item in value.items()]


def _decode(kind: str, value: Any) -> Any:
    if value is None or kind == _PLAIN:
        return value
    if kind == _BYTES:
        return _unb64(value)
    if not isinstance(value, list):
        raise JobError(f"expected a list, got {value!r:.60}")
    if kind == _LIST:
        return [_unb64(item) for item in value]
    try:
        return {_unb64(key): _unb64(item) for key, item in value}
    except (TypeError, ValueError) as error:
        raise JobError(f"expected pairs, got {value!r:.60}") from error


def changed(record: Any, **values: Any) -> Any:
    """A record like `record`, but for the fields that are given."""
    return type(record)(**{name: getattr(record, name) for name in record.FIELDS} | values)


class Layer(_Record):
    """One file system of the merged root; the first is the lowest (the base image)."""

    FIELDS = {
        "source": _BYTES,
        "fstype": _PLAIN,
        "offset": _PLAIN,
        "writable": _PLAIN,
        "hidden": _PLAIN,
    }
    source: bytes = b""  # a block device; of a shared directory what `shares.mount` takes
    fstype: str = "squashfs"
    offset: int = 0  # bytes from the device's start, for a partition
    writable: bool = False  # mounted read-write as the root itself, without an overlay
    hidden: list[str] = []  # directories of it that the guest does not show (relative paths)


class Mount(_Record):
    """A directory or one file of the host in the guest."""

    FIELDS = {"source": _BYTES, "target": _BYTES, "read_only": _PLAIN, "name": _BYTES}
    source: bytes = b""  # path for hostfs, else a tag
    target: bytes = b""  # absolute path in the guest
    read_only: bool = False
    name: bytes = b""  # of the one file in `source` that is meant; empty: the directory itself


class Network(_Record):
    """The guest's interface; addresses as dotted quads."""

    FIELDS = dict.fromkeys(
        ("device", "address", "prefix", "gateway", "dns", "mtu", "confirm"), _PLAIN
    )
    device: str = "vec0"
    address: str = "10.0.2.100"
    prefix: int = 24
    gateway: str = "10.0.2.2"
    dns: str = "10.0.2.3"  # several are parted by spaces
    mtu: int = 1500
    confirm: bool = False  # the launcher has something to do once the interface is up


class Report(_Record):
    """Where a guest without a launcher says how its job went.  URLs take a PUT."""

    FIELDS = dict.fromkeys(("put", "status", "outputs", "disk", "headers", "ca"), _PLAIN)
    put: str | None = None  # URL of a folder: stands for status.json and outputs.tar.gz in it
    status: str | None = None  # URL for the status, JSON
    outputs: str | None = None  # URL for the outputs, a compressed tar
    disk: str | None = None  # block device that takes both as a tar; None: one that offers itself
    headers: dict[str, str] = {}  # sent with each request
    ca: str | None = None  # certificates (PEM) to believe with https; None: the public ones

    def status_url(self) -> str | None:
        """Where the status goes."""
        return self.status or (f"{self.put.rstrip('/')}/status.json" if self.put else None)

    def outputs_url(self) -> str | None:
        """Where the outputs go."""
        return self.outputs or (f"{self.put.rstrip('/')}/outputs.tar.gz" if self.put else None)


class Job(_Record):
    """What to run and in what surroundings.  See the fields."""

    FIELDS = {
        "argv": _LIST,
        "script": _BYTES,
        "env": _PAIRS,
        "cwd": _BYTES,
        "user": _PLAIN,
        "uid": _PLAIN,
        "gid": _PLAIN,
        "groups": _PLAIN,
        "umask": _PLAIN,
        "rlimits": _PLAIN,
        "tty": _PLAIN,
        "rows": _PLAIN,
        "columns": _PLAIN,
        "closed": _PLAIN,
        "layers": _PLAIN,
        "scratch": _BYTES,
        "session": _PLAIN,
        "in_pot": _PLAIN,
        "mounts": _PLAIN,
        "share": _PLAIN,
        "job_dir": _BYTES,
        "job_copy": _PLAIN,
        "outputs": _LIST,
        "follow": _LIST,
        "exchange": _BYTES,
        "modules": _BYTES,
        "report": _PLAIN,
        "network": _PLAIN,
        "hostname": _PLAIN,
        "localtime": _BYTES,
        "search_path": _BYTES,
        "run_scripts": _PLAIN,
        "warm": _PLAIN,
    }
    argv: list[bytes] = []  # empty: a login shell
    script: bytes | None = None  # contents of the program that is run, with argv its arguments
    env: dict[bytes, bytes] = {}
    cwd: bytes | None = None  # None: the job directory, else the home directory
    user: str = USER  # who runs the payload: USER, or an account of the image
    uid: int = 1000  # of the account USER
    gid: int = 1000
    groups: list[list[Any]] = []  # supplementary groups as [gid, name]
    umask: int | None = None
    rlimits: dict[str, list[int]] = {}  # "NOFILE" -> [soft, hard], -1 is unlimited
    tty: bool = False
    rows: int = 24
    columns: int = 80
    closed: list[int] = []  # of 0, 1, 2: closed for the payload as they are for the caller
    layers: list[Layer] = []
    scratch: bytes | None = None  # a blank block device for the writable layer; None: tmpfs
    session: bool = False  # what is on `scratch` is kept from run to run
    in_pot: bool = False  # the payload is one of the pot's own programs, run in its root
    mounts: list[Mount] = []
    share: str = "hostfs"  # the file system that shows directories of the host
    job_dir: bytes | None = None  # source of the job directory, like that of a mount
    job_copy: bool = False  # it is a copy: its files are on the config drive, see drive.py
    outputs: list[bytes] = []  # patterns of what comes back; of a copy, none: all that is new
    follow: list[bytes] = []  # paths of files that come back while they grow
    exchange: bytes | None = None  # source of the directory where chunks of stdin appear
    modules: bytes | None = None  # hostfs path of kernel modules, for a kernel that needs them
    report: Report | None = None  # where to, without a launcher
    network: Network | None = None
    hostname: str = "apppot"
    localtime: bytes | None = None  # contents for /etc/localtime
    search_path: bytes = SEARCH_PATH.encode()
    run_scripts: bool = False  # without argv: apppot-run in the job directory, apppot-autorun
    warm: bool = False  # boot, then wait for WAKE, which brings the job to run

    def has_job_dir(self) -> bool:
        """Whether there is a job directory, shared or copied."""
        return self.job_copy or self.job_dir is not None

    def to_json(self) -> dict[str, Any]:
        fields = super().to_json()
        fields["layers"] = [layer.to_json() for layer in self.layers]
        fields["mounts"] = [mount.to_json() for mount in self.mounts]
        fields["network"] = self.network and self.network.to_json()
        fields["report"] = self.report and self.report.to_json()
        return {"version": VERSION, **fields}

    def dump(self) -> bytes:
        """The description as it stands in a config drive."""
        return dumps(self.to_json()).encode("ascii")

    @classmethod
    def load(cls, data: bytes) -> Job:
        """The job that `data` describes.  Raises JobError."""
        try:
            value: Any = loads(data.decode("utf-8"))
        except ValueError as error:
            raise JobError(f"not JSON: {error}") from error
        if not isinstance(value, dict) or value.pop("version", None) != VERSION:
            raise JobError(f"not a job description of version {VERSION}")
        job: Job = cls.from_json(value)
        job.layers = [Layer.from_json(item) for item in job.layers]
        job.mounts = [Mount.from_json(item) for item in job.mounts]
        job.network = None if job.network is None else Network.from_json(job.network)
        job.report = None if job.report is None else Report.from_json(job.report)
        return job
