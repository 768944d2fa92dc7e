"""What an engine is to the rest: probe, boot, restore, and the VM that comes back.

Nothing above asks which engine it is.

A VM's byte channel to the agent and its control channel are socket pairs handed down at spawn, so that no VM has a
socket with a name.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.model.net import Attachment, Namespace
from pytest_fcvm.model.specs import NetworkMode

__all__ = [
    "Accelerator",
    "BootPlan",
    "Engine",
    "EngineReport",
    "GuestFiles",
    "RestorePlan",
    "SnapshotFiles",
    "Vm",
    "VmExit",
    "VmShape",
]


class Accelerator(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


def _no_vmlinux() -> Path:
    raise EngineError("nobody unpacked the kernel")


@dataclass(frozen=True, kw_only=True)
class GuestFiles:
    """What a guest boots from. `kernel` is a bzImage, `rootfs` one read-only squashfs (None for a smoke boot).

    `vmlinux` returns the ELF kernel in that bzImage, unpacked when an engine first asks for it.
    """

    kernel: Path
    initramfs: Path
    rootfs: Path | None
    vmlinux: Callable[[], Path] = field(default=_no_vmlinux)


@dataclass(frozen=True, kw_only=True)
class VmShape:
    """What cannot change between a base and its clones. `egress` lets the guest open connections to the outside.

    `network` is one of the engine's own. `disk_mib` is the size of the scratch disk, 0 without one. With `metadata` it
    has a service that tells the plan's.
    """

    mem_mib: int
    cpus: int
    network: NetworkMode = NetworkMode.USER
    egress: bool = False
    disk_mib: int = 0
    balloon: bool = False
    metadata: bool = False


@dataclass(frozen=True, kw_only=True)
class BootPlan:
    """A base to boot. `memory` is the file that will hold the guest's memory; the engine creates it.

    `disk` is the image of its scratch disk, which it writes to. With a network that is enclosed it has a `namespace`.
    """

    name: str
    shape: VmShape
    files: GuestFiles
    memory: Path
    disk: Path | None = None
    namespace: Namespace | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class SnapshotFiles:
    """The files of a snapshot an engine reads: guest memory, device state, rootfs, the scratch disk if it has one.

    `of_clone` says that they were made by `Vm.save`, not by `Vm.snapshot`.
    """

    memory: Path
    state: Path
    rootfs: Path
    disk: Path | None = None
    of_clone: bool = False

    def discard(self) -> None:
        """Remove what `Vm.save` has written of them."""
        for path in (self.memory, self.state, self.disk):
            if path:
                path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """A clone to restore.

    `attachments` lead to private networks, at most as many as `Engine.private_networks` says. With a network that is
    enclosed it has a `namespace`, and the VMM is killed before that is closed.
    """

    name: str
    shape: VmShape
    files: SnapshotFiles
    attachments: tuple[Attachment, ...] = ()
    namespace: Namespace | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class EngineReport:
    """The verdict of a probe.

    `identity` is everything about the VMM and the host that a snapshot depends on (digests, versions, CPU model, TSC
    kHz): it enters the snapshot's key. `reason` is for people: why the engine is not usable, or why it is without KVM.
    """

    engine: str
    usable: bool
    version: str = ""
    accelerator: Accelerator | None = None
    reason: str = ""
    hint: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VmExit:
    """How the VMM process ended: `code` or `signal`, never both; `killed_by_us` after `Vm.kill`."""

    code: int | None = None
    signal: int | None = None
    killed_by_us: bool = False


class Vm(Protocol):
    """One VMM process. Every method may be called from any thread; after its death they raise EngineError at once.

    `name` is what messages call it: first the plan's, then that of the clone which it becomes.
    """

    name: str

    @property
    def pid(self) -> int:
        """Return the process id of the VMM."""
        ...

    @property
    def console_path(self) -> Path:
        """Return the file that receives the guest's serial console."""
        ...

    @property
    def vmm_log_path(self) -> Path:
        """Return the file that receives what the VMM itself prints."""
        ...

    @property
    def disk(self) -> Disk | None:
        """Return a clone's private scratch disk, the caller's to close once the VM is killed."""
        ...

    @property
    def namespace(self) -> Namespace | None:
        """Return the namespace that its plan had."""
        ...

    def channel(self) -> socket.socket:
        """Return the byte channel to the agent: a connected stream socket, the caller's to close.

        It is usable before the guest runs: bytes written early are read by the agent when it comes to life.
        """
        ...

    def get_ready(self) -> None:
        """Let a prepared VM take what it can take before `start`, which does it otherwise. Raise EngineError."""
        ...

    def start(self) -> None:
        """Let a prepared VM load its snapshot and run, and return at once. Others have been started already."""
        ...

    def wait_until_running(self, timeout_s: float) -> None:
        """Wait until the restored guest executes. A booted VM runs from the start."""
        ...

    def set_link(self, attachment: int, up: bool) -> None:
        """Plug one of the plan's attachments in or out, counted from 0; the guest's card notices."""
        ...

    def pause(self) -> None:
        """Stop the guest's CPUs."""
        ...

    def resume(self) -> None:
        """Let the guest's CPUs run again."""
        ...

    def snapshot(self, state: Path) -> None:
        """Stop the guest and write its device state to `state`; guest memory is then whole in `BootPlan.memory`.

        The VM is of no more use afterwards and must be killed with its channel untouched.
        """
        ...

    def save(self, dest: SnapshotFiles) -> None:
        """Write memory, device state and disk of a running clone to new files, and let it go on.

        Its agent must be parked, and gets a new `channel` afterwards. Raise EngineError or HostError, leaving no file;
        the clone goes on all the same.
        """
        ...

    def kill(self) -> None:
        """Kill the VMM with SIGKILL and return at once; idempotent."""
        ...

    def wait(self, timeout_s: float) -> VmExit:
        """Wait until the VMM process has ended. Raise EngineError at the deadline."""
        ...

    def set_balloon(self, mib: int) -> None:
        """Ask the guest to give so much of its memory to the balloon in all. Raise EngineError without one."""
        ...

    def balloon_mib(self) -> int:
        """Return how much of the guest's memory is in the balloon. Raise EngineError without one."""
        ...

    def set_metadata(self, data: Mapping[str, Any]) -> None:
        """Serve this instead of the plan's metadata. Raise EngineError without a service."""
        ...

    def latencies(self) -> Mapping[str, float]:
        """Return how long the VMM says that its own work took, in ms by its name; empty where it says nothing.

        Never raises, and waits for at most 2 s.
        """
        ...

    def explain(self) -> FcvmError:
        """Return why the VM is dead, with the tails of its console and log; waits up to 2 s for its end."""
        ...

    def on_exit(self, callback: Callable[[VmExit], None]) -> None:
        """Call back once from a service thread when the VMM has ended, at once if it already has."""
        ...


class Engine(Protocol):
    """A way to run VMs. `networks` are those its clones can have, the first one where nobody says another.

    An engine that `joins_namespaces` runs its VMMs in those that the plans have; another is given descriptors.
    """

    networks: tuple[NetworkMode, ...]
    joins_namespaces: bool

    @property
    def name(self) -> str:
        """Return the engine's name as `--fcvm-engine` takes it."""
        ...

    def check(self, shape: VmShape) -> None:
        """Raise UsageProblem, with the way out, for a machine that this engine cannot make."""
        ...

    def private_networks(self, mode: NetworkMode) -> int:
        """Return how many private networks a clone can be on, beside a network of this mode."""
        ...

    def probe(self, smoke: GuestFiles) -> EngineReport:
        """Say whether this engine works here, by booting `smoke` (no rootfs) where only that proves it. Cached."""
        ...

    def boot(self, plan: BootPlan) -> Vm:
        """Start a base. Raise EngineError or HostError; a VM that fails leaves nothing."""
        ...

    def prepare(self, plan: RestorePlan) -> Vm:
        """Spawn a clone's VMM and return at once. It gets itself ready and then waits for `Vm.start`, at no cost."""
        ...

    def restore(self, plan: RestorePlan) -> Vm:
        """Spawn a clone's VMM, start it and return at once; the guest comes to life meanwhile."""
        ...

    def base_arguments(self, shape: VmShape) -> tuple[str, ...]:
        """Return what of the base's command line changes what a clone is: part of the snapshot's key."""
        ...
