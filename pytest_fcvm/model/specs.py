"""What a test asks for: the machine, its image, when it is ready, what is done to it before the snapshot."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.model.net import PublishedPort
from pytest_fcvm.model.settings import Ulimit

__all__ = [
    "Clock",
    "MappedPath",
    "NetworkMode",
    "NetworkSpec",
    "Prepare",
    "ReadyMode",
    "ReadySpec",
    "VmSpec",
]


class ReadyMode(StrEnum):
    """How it is known that the service answers."""

    HTTP = "http"
    TCP = "tcp"
    LOG = "log"
    EXEC = "exec"
    HEALTHCHECK = "healthcheck"
    AGENT = "agent"
    EXIT = "exit"

    @property
    def needs_port(self) -> bool:
        """Say whether the mode speaks to a port of the guest."""
        return self in (ReadyMode.HTTP, ReadyMode.TCP)


@dataclass(frozen=True, kw_only=True)
class ReadySpec:
    """A readiness condition. `text` is a path for http, a regular expression for log, a shell command for exec,
    an exit code for exit.

    `times` is how often the expression has to match. Filled in when the image is known: `argv` is the image's own check
    for healthcheck, which takes `check_s` at most and is made again after `interval_s` at the latest; `others` are the
    TCP ports that the image exposes besides `port`.
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
    def may_end_with(self) -> int | None:
        """Return the exit code with which the workload may end for good, None where it has to go on."""
        if self.mode is ReadyMode.EXIT:
            return int(self.text)
        return 0 if self.mode is ReadyMode.AGENT else None

    def __str__(self) -> str:
        if self.mode.needs_port:
            return f"{self.mode}:{self.port}{self.text}" + "".join(f", {port}" for port in self.others)
        often = f"@{self.times}" if self.times > 1 else ""
        return f"{self.mode}{often}:{self.text}" if self.text else str(self.mode)


class NetworkMode(StrEnum):
    """How a clone is joined to the host.

    By what its engine does best, by slirp in the VMM, by the agent; or by a card in a network namespace of its own,
    whose way out is slirp4netns, without rights, or a bridge of the host's, which takes root.
    """

    AUTO = "auto"
    USER = "user"
    RELAY = "relay"
    ROOTLESS = "rootless"
    BRIDGE = "bridge"

    @property
    def has_egress(self) -> bool:
        """Say whether the guest can be let out through it."""
        return self is not NetworkMode.RELAY

    @property
    def uses_netns(self) -> bool:
        """Say whether the VM has a network namespace of its own."""
        return self in (NetworkMode.ROOTLESS, NetworkMode.BRIDGE)


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """A clone's network. Without `egress` the guest reaches nothing outside itself.

    `allow` are networks, addresses and names: with any, the guest connects to nothing else. With `proxy` the workload
    gets the variables that tell programs of a proxy (`https_proxy` and the like), as pytest has them.
    """

    mode: NetworkMode = NetworkMode.AUTO
    egress: bool = False
    allow: tuple[str, ...] = ()
    proxy: bool = False

    def finalize(self, offered: Sequence[NetworkMode], engine: str) -> NetworkSpec:
        """Return what it comes to on an engine that offers these, the first by preference. Raise UsageProblem."""
        fit = [mode for mode in offered if (mode.has_egress or not self.egress) and (mode.uses_netns or not self.allow)]
        if self.mode is NetworkMode.AUTO and fit:
            return replace(self, mode=fit[0])
        if self.mode in fit:
            return self
        raise UsageProblem(
            f"the engine {engine} has no network {str(self)!r}",
            hint=f"it has {', '.join(offered)}; relay has no way out, and user none that can be narrowed with allow",
        )

    def __str__(self) -> str:
        allowed = (f"allow={target}" for target in self.allow)
        return ",".join((str(self.mode), *["egress"] * self.egress, *allowed, *["proxy"] * self.proxy))


class Clock(StrEnum):
    """What time of day it is in a clone: the host's, or the snapshot's, which goes on from where it was."""

    HOST = "host"
    SNAPSHOT = "snapshot"


@dataclass(frozen=True, kw_only=True)
class MappedPath:
    """A file or directory of the host that is copied into the guest before the workload starts.

    It takes the place of what was there. `owner` is a user of the image, and a group, by name or number; without one,
    the host's numbers are kept.
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
    """Work on the ready base before it is snapshotted: load rows, warm caches.

    `func` is called with the base (a `Clone`). It runs again whenever its source file, the bytes of a file in `inputs`
    or `version` change. Relative `inputs` start at the directory of the source file.
    """

    func: Callable[[Any], object]
    inputs: Sequence[str | Path] = ()
    version: str = ""

    def identity(self) -> str:
        """Return a digest of everything that decides what the function does. Raise UsageProblem for a missing input."""
        source = _source_file(self.func)
        digest = hashlib.sha256(f"{self.func.__module__}.{self.func.__qualname__}\0{self.version}\0".encode())
        for path in (source, *(source.parent / name for name in self.inputs)):
            digest.update(_read(path))
            digest.update(b"\0")
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class VmSpec:
    """The machine a test wants. Two equal specs share one snapshot.

    `env` and `publish` merge by key when a marker adds to them, every other field is replaced. `prepare` is a `Prepare`
    or a command line for the guest's shell. `warm`, a function that gets the clone or a command, is run in clones that
    are made ahead of their tests: what it does is in them, and what it runs is fast in the test. `disk_mib` puts what
    the guest writes on a disk instead of in memory. `hook` is a line for the guest's shell, run as root in each clone
    before its workload goes on. With `own_address` each clone's ports are at a loopback address of its own, under the
    guest's own numbers. `host_ports` are those of this host's 127.0.0.1 that its programs reach as `host.fcvm`. `needs`
    names those of an `fcvm_group` that must be ready before it: its own condition is then waited for in the clone, and
    the base is taken as soon as its workload runs. With a `balloon`, memory can be taken from its clones. `metadata` is
    what its programs read from http://169.254.169.254, as in a cloud. An `entrypoint` replaces the image's, whose own
    arguments then go too; an empty one takes it away. `hostname` is the name under which the workload starts and that
    its clones keep. `shm_mib` is the size of /dev/shm. `ulimits` and `sysctls` are set before the workload starts.
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
    needs: tuple[str, ...] = ()

    @property
    def of_clones(self) -> Hashable:
        """Return what of it makes clones differ that are of the same snapshot."""
        return (
            self.needs and (self.needs, self.ready),
            self.publish,
            self.own_address,
            self.host_ports,
            id(self.warm) if callable(self.warm) else self.warm,
            self.hook,
            self.clock,
        )

    def merged(self, changes: Mapping[str, Any]) -> VmSpec:
        """Return a spec with the changes of a closer source laid over this one. Raise UsageProblem for a wrong name."""
        unknown = sorted(set(changes) - {item.name for item in fields(self)})
        if unknown:
            raise UsageProblem(f"a machine has no field {unknown[0]!r}", hint=f"fields: {', '.join(spec_fields())}")
        laid = dict(changes)
        if "env" in laid:
            laid["env"] = {**self.env, **laid["env"]}
        if "publish" in laid:
            ports = {(port.proto, port.guest_port): port for port in (*self.publish, *laid["publish"])}
            laid["publish"] = tuple(ports.values())
        return replace(self, **laid)


def spec_fields() -> tuple[str, ...]:
    """Return the names of a spec's fields in their order."""
    return tuple(item.name for item in fields(VmSpec))


def _source_file(func: Callable[[Any], object]) -> Path:
    with suppress(TypeError):  # what is no function of a module: a partial, a built-in, an object
        path = Path(inspect.getfile(inspect.unwrap(func)))
        if path.is_file():
            return path
    raise UsageProblem(f"prepare function {func!r} has no source file", hint="pass a function defined in a module")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageProblem(f"prepare needs {path}: {error.strerror}", hint="name an existing file in inputs") from error
