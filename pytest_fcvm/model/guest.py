"""The messages between host and agent as data classes. guest/ has their encoding."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

__all__ = [
    "MORE_MEMORY",
    "ExitStatus",
    "GuestConfig",
    "Identity",
    "ListenState",
    "ProcessSpec",
    "WorkloadState",
    "WorkloadStatus",
    "memory_advice",
    "memory_ran_out",
]


@dataclass(frozen=True, kw_only=True)
class GuestConfig:
    """The configuration that the agent needs to start the workload; sent once per boot.

    `address` has a prefix length ("10.0.2.15/24"), `hosts` are lines of /etc/hosts, `mac` is "52:54:00:12:34:56".
    `upper_mib` is the size of the writable layer in memory; `upper_device` is the disk that holds that layer instead.
    With `peer_gateway` the guest itself owns the gateway's address, because its NIC has no peer. `volumes` are absolute
    paths of directories to keep off the overlay, outer ones first. `ulimits` maps Linux's numbers to soft and hard
    limits, -1 for unlimited. `shm_mib` is the size of /dev/shm.
    """

    hostname: str = ""
    machine_id: str = ""
    root_device: str = "/dev/vda"
    upper_mib: int | None = None
    upper_device: str = ""
    interface: str = "eth0"
    mac: str = ""
    address: str = ""
    gateway: str = ""
    dns: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    peer_gateway: bool | None = None
    volumes: tuple[str, ...] = ()
    shm_mib: int | None = None
    ulimits: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    sysctls: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What makes a clone different from other clones. Fields left out keep their values from the snapshot.

    There is no host name here: services remember the one with which they started. `hosts` replaces the earlier lines.
    `entropy` is 32 bytes, `machine_id` 32 hex digits, `boot_id` a UUID. The agent runs the command `hook`, with the
    environment `hook_env` and for 10 s at most, after it has set all else and before the workload resumes. With
    `stays_frozen` the workload does not resume until the next identity.
    """

    entropy: bytes = b""
    realtime_ns: int | None = None
    machine_id: str = ""
    boot_id: str = ""
    interface: str = ""
    mac: str = ""
    address: str = ""
    gateway: str = ""
    dns: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    peer_gateway: bool | None = None
    hook: tuple[str, ...] = ()
    hook_env: Mapping[str, str] = field(default_factory=dict)
    stays_frozen: bool = False


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """A program to run in the guest. `user` is `user|uid[:group|gid]`, resolved by the image's own files."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    user: str = ""


@dataclass(frozen=True, kw_only=True)
class ExitStatus:
    """How a program in the guest ended: `code` or `signal`, never both. `message` says why it could not start.

    `oom_kills` counts the processes that the guest's kernel killed meanwhile because memory ran out, in any program.
    """

    code: int | None = None
    signal: int | None = None
    message: str = ""
    oom_kills: int = 0

    @property
    def exit_code(self) -> int:
        """Return the exit code, or 128 + signal, as shells and container engines do."""
        return self.code if self.code is not None else 128 + (self.signal or 0)

    @property
    def returncode(self) -> int:
        """Return the exit code, or the negative signal number, as `subprocess` does."""
        return self.code if self.code is not None else -(self.signal or 0)

    def __str__(self) -> str:
        how = f"signal {_signal_name(self.signal or 0)}" if self.code is None else f"exit code {self.code}"
        return f"{how} ({self.message})" if self.message else how


class WorkloadState(StrEnum):
    """The state of the image's own program."""

    IDLE = "idle"
    RUNNING = "running"
    EXITED = "exited"
    FROZEN = "frozen"


@dataclass(frozen=True, kw_only=True)
class WorkloadStatus:
    """The state of the workload, how it ended, and how many of its processes the guest's kernel killed for memory."""

    state: WorkloadState
    exit: ExitStatus | None = None
    oom_kills: int = 0


MORE_MEMORY = "give it more with mem=SIZE or --fcvm-mem SIZE"


def memory_ran_out(oom_kills: int) -> str:
    """Return what the guest's kernel did when memory ran out, "" if it did not run out."""
    killed = f"{oom_kills} processes" if oom_kills != 1 else "a process"
    return f"the guest's memory ran out and its kernel killed {killed}" if oom_kills else ""


def memory_advice(oom_kills: int) -> str:
    """Return what happened and what to do when the guest's memory ran out."""
    return f"{memory_ran_out(oom_kills)}: {MORE_MEMORY}"


class ListenState(IntEnum):
    """Whether a guest port has a listener, and whether the host can reach that listener."""

    CLOSED = 0
    OPEN = 1
    LOOPBACK_ONLY = 2
    IPV6_ONLY = 3

    def why_silent(self, port: int) -> str:
        """Return why a port does not answer, "" if the host can reach it."""
        match self:
            case ListenState.OPEN:
                return ""
            case ListenState.IPV6_ONLY:
                return f"the listener on port {port} accepts only IPv6, and the host connects over IPv4: listen on both"
            case _:
                return f"nothing listens on port {port}, or only on a loopback address"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX
        return str(number)
