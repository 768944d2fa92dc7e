"""What the host tells the agent and what it hears back, free of how it travels."""

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
    """What the agent needs before it can start the workload; sent once per boot.

    `address` has a prefix length ("10.0.2.15/24"), `hosts` are lines of /etc/hosts, `mac` is "52:54:00:12:34:56",
    `upper_mib` is the size of the writable layer in memory, `upper_device` the disk with its file system instead. With
    `peer_gateway` the guest owns the gateway's address itself, because there is no peer on its NIC. `volumes` are
    absolute paths of directories that are not to be on the overlay, outer ones first; `ulimits` are soft and hard
    limits, -1 for none, by Linux's numbers; `shm_mib` is the size of /dev/shm.
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
    """What makes one clone different from the next; whatever is left out stays as it was in the snapshot.

    The host name is not in it: services remember under which one they have started. `hosts` replace those of before.
    `entropy` is 32 bytes, `machine_id` 32 hex digits, `boot_id` a UUID. `hook` is a command that the agent runs
    after all this is set and before the workload goes on, for 10 s at most, with the environment `hook_env`. One that
    `stays_frozen` lets the workload wait for the next.
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
    """A program to run in the guest. `user` is `user|uid[:group|gid]`, looked up in the image's own files."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    user: str = ""


@dataclass(frozen=True, kw_only=True)
class ExitStatus:
    """How a program of the guest ended: `code` or `signal`, never both; `message` says why it could not be started.

    `oom_kills` is how many processes the guest's kernel killed for want of memory meanwhile, others' included.
    """

    code: int | None = None
    signal: int | None = None
    message: str = ""
    oom_kills: int = 0

    @property
    def exit_code(self) -> int:
        """Return the exit code, 128 and the signal's number for a signal, as shells and engines of containers do."""
        return self.code if self.code is not None else 128 + (self.signal or 0)

    @property
    def returncode(self) -> int:
        """Return the exit code, negative for a signal, as `subprocess` has it."""
        return self.code if self.code is not None else -(self.signal or 0)

    def __str__(self) -> str:
        how = f"signal {_signal_name(self.signal or 0)}" if self.code is None else f"exit code {self.code}"
        return f"{how} ({self.message})" if self.message else how


class WorkloadState(StrEnum):
    """What the image's own program is doing."""

    IDLE = "idle"
    RUNNING = "running"
    EXITED = "exited"
    FROZEN = "frozen"


@dataclass(frozen=True, kw_only=True)
class WorkloadStatus:
    """The state of the workload, how it ended if it did, and how often the guest's kernel killed in it for memory."""

    state: WorkloadState
    exit: ExitStatus | None = None
    oom_kills: int = 0


MORE_MEMORY = "give it more with mem=SIZE or --fcvm-mem SIZE"


def memory_ran_out(oom_kills: int) -> str:
    """Say what the guest's kernel did when there was no memory left, "" where there was."""
    killed = f"{oom_kills} processes" if oom_kills != 1 else "a process"
    return f"the guest's memory ran out and its kernel killed {killed}" if oom_kills else ""


def memory_advice(oom_kills: int) -> str:
    """Say what happened and what to do, of a guest in which memory ran out."""
    return f"{memory_ran_out(oom_kills)}: {MORE_MEMORY}"


class ListenState(IntEnum):
    """Whether a port of the guest has a listener, and one that can be reached from outside the guest."""

    CLOSED = 0
    OPEN = 1
    LOOPBACK_ONLY = 2
    IPV6_ONLY = 3

    def why_silent(self, port: int) -> str:
        """Say why a port gives no answer, "" where it can be reached."""
        match self:
            case ListenState.OPEN:
                return ""
            case ListenState.IPV6_ONLY:
                return f"the listener on port {port} takes IPv6 alone, and is reached over IPv4: let it listen on both"
            case _:
                return f"nothing listens on port {port}, or on a loopback address alone"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX
        return str(number)
