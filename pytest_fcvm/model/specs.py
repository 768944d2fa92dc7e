"""What a test asks for: the VM, its image and network, the readiness condition, the work before the snapshot."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.model.net import PublishedPort
from pytest_fcvm.model.settings import Ulimit

__all__ = [
    "Clock",
    "CloneFields",
    "MappedPath",
    "NetworkMode",
    "NetworkSpec",
    "Prepare",
    "ReadyMode",
    "ReadySpec",
    "SpecFields",
    "VmSpec",
]


class ReadyMode(StrEnum):
    """The kind of a readiness condition."""

    HTTP = "http"
    TCP = "tcp"
    LOG = "log"
    EXEC = "exec"
    HEALTHCHECK = "healthcheck"
    AGENT = "agent"
    EXIT = "exit"

    @property
    def needs_port(self) -> bool:
        """Say whether the condition has a guest port."""
        return self in (ReadyMode.HTTP, ReadyMode.TCP)


@dataclass(frozen=True, kw_only=True)
class ReadySpec:
    """The condition under which a service is ready.

    Write one as text ("http:80/health"; docs/reference/options.md lists all forms), or build it: `text` is a path for
    http, a regular expression for log, a shell command for exec, an exit code for exit. `port` is a guest port, for
    http and tcp. `times` is how often the regular expression must match.

    The plugin fills in the other fields when it knows the image: `argv` is the image's health check, which may run for
    `check_s` seconds and is repeated after `interval_s` seconds at the latest; `others` are the other TCP ports that
    the image exposes.
    """

    mode: ReadyMode
    port: int | None = None
    text: str = ""
    times: int = 1
    argv: tuple[str, ...] = ()
    check_s: float | None = None
    interval_s: float | None = None
    others: tuple[int, ...] = ()

    @property
    def expected_exit_code(self) -> int | None:
        """Return the exit code with which the workload may end, None if it must keep running."""
        if self.mode is ReadyMode.EXIT:
            return int(self.text)
        return 0 if self.mode is ReadyMode.AGENT else None

    def __str__(self) -> str:
        if self.mode.needs_port:
            return f"{self.mode}:{self.port}{self.text}" + "".join(f", {port}" for port in self.others)
        often = f"@{self.times}" if self.times > 1 else ""
        return f"{self.mode}{often}:{self.text}" if self.text else str(self.mode)


class NetworkMode(StrEnum):
    """How a clone reaches the host: `AUTO` picks the engine's best mode.

    `USER` is slirp in the VMM. `RELAY` sends all connections through the agent, without egress. `ROOTLESS` and `BRIDGE`
    give the VM a NIC in its own network namespace; egress is by slirp4netns, without privileges, or by a bridge of the
    host, which requires root.
    """

    AUTO = "auto"
    USER = "user"
    RELAY = "relay"
    ROOTLESS = "rootless"
    BRIDGE = "bridge"

    @property
    def has_egress(self) -> bool:
        """Say whether the mode supports egress."""
        return self is not NetworkMode.RELAY

    @property
    def uses_netns(self) -> bool:
        """Say whether the VM has its own network namespace."""
        return self in (NetworkMode.ROOTLESS, NetworkMode.BRIDGE)


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """The network of a clone.

    Write one as text ("user,egress"; docs/reference/options.md lists all forms), or build it. Without `egress` the
    guest connects to nothing outside itself. `allow` lists IPv4 networks, addresses and names; if it has any, the guest
    connects to nothing else. With `proxy` the workload gets pytest's proxy variables (`https_proxy` and the like).
    """

    mode: NetworkMode = NetworkMode.AUTO
    egress: bool = False
    allow: tuple[str, ...] = ()
    proxy: bool = False

    def finalize(self, offered: Sequence[NetworkMode], engine: str) -> NetworkSpec:
        """Return the network with one of the modes that the engine offers, the preferred first. Raise UsageProblem."""
        fit = [mode for mode in offered if (mode.has_egress or not self.egress) and (mode.uses_netns or not self.allow)]
        if self.mode is NetworkMode.AUTO and fit:
            return replace(self, mode=fit[0])
        if self.mode in fit:
            return self
        raise UsageProblem(
            f"the engine {engine} does not support the network {str(self)!r}",
            hint=f"{engine} supports {', '.join(offered)}; relay has no egress, and user does not support allow",
        )

    def __str__(self) -> str:
        allowed = (f"allow={target}" for target in self.allow)
        return ",".join((str(self.mode), *["egress"] * self.egress, *allowed, *["proxy"] * self.proxy))


class Clock(StrEnum):
    """The time of day in a clone: the host's, or the snapshot's, which continues where it stopped."""

    HOST = "host"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, kw_only=True)
class MappedPath:
    """A file or directory of the host that is copied into the guest before the workload starts.

    The copy replaces what is at `guest`, an absolute path. `owner` is a user of the image, or `user:group`, by name or
    number; without it, the copy keeps the numeric owner that it has on the host.
    """

    host: Path
    guest: str
    read_only: bool = False
    owner: str | None = None

    def __str__(self) -> str:
        options = ["ro"] * self.read_only + [f"owner={self.owner}"] * (self.owner is not None)
        return f"{self.host}:{self.guest}" + f":{','.join(options)}" * bool(options)


@dataclass(frozen=True)
class Prepare:
    """Work on the ready base before its snapshot, such as loading rows or warming caches.

    `func` is called with the base. The snapshot is rebuilt, and `func` called again, when its source file, a file in
    `inputs` or `version` changes. Relative `inputs` start at the directory of the source file.
    """

    func: Callable[[Any], object]
    inputs: Sequence[str | Path] = ()
    version: str = ""

    def identity(self) -> str:
        """Return a digest of the source file, the inputs and the version. Raise UsageProblem for a missing input."""
        source = _source_file(self.func)
        digest = hashlib.sha256(f"{self.func.__module__}.{self.func.__qualname__}\0{self.version}\0".encode())
        for path in (source, *(source.parent / name for name in self.inputs)):
            digest.update(_read(path))
            digest.update(b"\0")
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class VmSpec:
    """The VM that a test asks for. Equal specs share one snapshot.

    Change a spec with `merged`: `env` and `publish` merge by key, every other field is replaced.

    - `image`: an OCI image, a rootfs tar or a directory. `mem_mib`, `cpus`: memory in MiB, and virtual CPUs.
    - `disk_mib`: size in MiB of a scratch disk for what the guest writes. Without one, memory holds it.
    - `balloon`: whether `Clone.inflate_balloon` can take memory from the clones.
    - `env`, `user`, `workdir`: variables, user and working directory of the workload.
    - `entrypoint`: replaces the image's entrypoint and its arguments; () removes it. `command`: replaces the arguments.
    - `hostname`: the host name of the workload; clones keep it. `shm_mib`: the size of /dev/shm.
    - `ulimits`, `sysctls`: limits and kernel settings, set before the workload starts.
    - `map`: files of the host to copy into the guest. `metadata`: what http://169.254.169.254 serves to the guest.
    - `network`, `publish`: the network, and the guest ports to map to the host. With `own_address` each clone has its
      own loopback address, and ports there have the guest's numbers.
    - `host_ports`: ports of 127.0.0.1 on the host that the guest reaches at `host.fcvm`.
    - `ready`, `ready_timeout_s`: the readiness condition, None for the image's, and its time limit.
    - `prepare`: a `Prepare` or a shell command for the base, run when the base is ready, before the snapshot.
    - `warm`: a function that gets the clone, or a shell command, run in each prewarmed clone. Its effects stay.
    - `hook`: a shell command, run as root in each clone before the workload resumes.
    - `clock`: the time of day in clones.
    - `depends_on`: names of clones in an `fcvm_group` that must be ready before this one starts. The base is then
      snapshotted as soon as its workload runs, and `ready` is waited for in the clone.
    """

    image: str | None = None
    mem_mib: int = 256
    cpus: int = 1
    disk_mib: int | None = None
    balloon: bool = False
    env: Mapping[str, str] = field(default_factory=dict)
    publish: tuple[PublishedPort, ...] = ()
    own_address: bool = False
    host_ports: tuple[int, ...] = ()
    map: tuple[MappedPath, ...] = ()
    metadata: Mapping[str, Any] | None = None
    network: NetworkSpec = NetworkSpec()
    ready: ReadySpec | None = None
    ready_timeout_s: float = 120.0
    prepare: Prepare | str | None = None
    warm: Callable[[Any], object] | str | None = None
    hook: str | None = None
    clock: Clock = Clock.HOST
    user: str | None = None
    workdir: str | None = None
    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None
    hostname: str = "fcvm-base"
    shm_mib: int | None = None
    ulimits: Mapping[str, Ulimit] = field(default_factory=dict)
    sysctls: Mapping[str, str] = field(default_factory=dict)
    depends_on: tuple[str, ...] = ()

    @property
    def clone_settings(self) -> Hashable:
        """Return the fields that affect clones but not their snapshot."""
        return (
            self.depends_on and (self.depends_on, self.ready, self.ready_timeout_s),
            self.publish,
            self.own_address,
            self.host_ports,
            id(self.warm) if callable(self.warm) else self.warm,
            self.hook,
            self.clock,
        )

    def merged(self, changes: Mapping[str, Any]) -> VmSpec:
        """Return the spec with these changes. Raise UsageProblem for an unknown field."""
        unknown = sorted(set(changes) - {item.name for item in fields(self)})
        if unknown:
            raise UsageProblem(f"a VM spec has no field {unknown[0]!r}", hint=f"fields: {', '.join(spec_fields())}")
        values = dict(changes)
        if "env" in values:
            values["env"] = {**self.env, **values["env"]}
        if "publish" in values:
            ports = {(port.proto, port.guest_port): port for port in (*self.publish, *values["publish"])}
            values["publish"] = tuple(ports.values())
        return replace(self, **values)


class CloneFields(TypedDict, total=False):
    """The fields of `fcvm_clone_factory`: those of `SpecFields` without the network between a clone and the host."""

    image: str | Path
    mem: str | int
    cpus: str | int
    disk: str | int
    balloon: bool | str
    env: Mapping[str, str | float | PathLike[str]] | Iterable[str] | str
    publish: str | int | PublishedPort | Sequence[str | int | PublishedPort] | set[str | int | PublishedPort]
    own_address: bool | str
    host_port: str | int | Sequence[str | int] | set[str | int]
    map: str | MappedPath | Sequence[str | MappedPath]
    metadata: Mapping[str, object] | str | Path
    ready: str | ReadySpec
    ready_timeout: str | float
    prepare: Prepare | Callable[[Any], object] | str
    warm: Callable[[Any], object] | str
    hook: str
    clock: str
    user: str
    workdir: str
    entrypoint: str | Iterable[str]
    command: str | Iterable[str]
    hostname: str
    shm_size: str | int
    ulimit: str | Mapping[str, object] | Iterable[str]
    sysctl: str | Mapping[str, object] | Iterable[str]


class SpecFields(CloneFields, total=False):
    """The fields of the marker `fcvm` and of the factories, in the spellings that options.py parses into a VmSpec."""

    network: str | NetworkSpec


def spec_fields() -> tuple[str, ...]:
    """Return the names of the fields of VmSpec, in order."""
    return tuple(item.name for item in fields(VmSpec))


def _source_file(func: Callable[[Any], object]) -> Path:
    with suppress(TypeError):  # not a function of a module: a partial, a built-in, an object
        path = Path(inspect.getfile(inspect.unwrap(func)))
        if path.is_file():
            return path
    raise UsageProblem(f"prepare function {func!r} has no source file", hint="pass a function defined in a module")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageProblem(
            f"prepare cannot read {path}: {error.strerror}", hint="name existing files in inputs"
        ) from error
