"""What every engine can do: probe this host, boot a base, prepare a clone; and what every VM can do.

Code above the engines never asks which engine it has. What only some engines can do is in `abilities.py`.

QEMU gets its monitor and its channel to the agent as socket pairs, at spawn. Firecracker has two named sockets in the
VM's own directory: its API and its vsock.
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
    "PreparedVm",
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
    raise EngineError("the plan has no unpacked kernel")


@dataclass(frozen=True, kw_only=True)
class GuestFiles:
    """What a guest boots from. `kernel` is a bzImage, `rootfs` a read-only squashfs, None for a smoke boot.

    `vmlinux` returns the ELF kernel in that bzImage. It unpacks the kernel at the first call.
    """

    kernel: Path
    initramfs: Path
    rootfs: Path | None
    vmlinux: Callable[[], Path] = field(default=_no_vmlinux)


@dataclass(frozen=True, kw_only=True)
class VmShape:
    """What cannot change between a base and its clones.

    `network` is one of `Engine.networks`. `egress` gives the guest outbound access. `disk_mib` is the size of the
    scratch disk, 0 for none. `balloon` and `metadata` give the VM a balloon and a metadata service.
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
    """A base to boot. The engine creates `memory`, the file for the guest's memory.

    The base writes to `disk`, the image of its scratch disk. `namespace` is set where the VM has a network namespace.
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
    """The files of a snapshot that an engine reads: guest memory, device state, rootfs, and the scratch disk if any.

    `of_clone` is true for files that `Vm.save` wrote, false for those of `Vm.snapshot`.
    """

    memory: Path
    state: Path
    rootfs: Path
    disk: Path | None = None
    of_clone: bool = False

    def discard(self) -> None:
        """Remove the files that `Vm.save` writes."""
        for path in (self.memory, self.state, self.disk):
            if path:
                path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class RestorePlan:
    """A clone to restore.

    `attachments` join the clone to private networks, at most `Engine.private_networks` of them. `namespace` is set
    where the VM has a network namespace; the caller closes the namespace after the VMM has ended.
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
    kHz). It is part of the snapshot's key. `reason` says why the engine is not usable, or why it does not use KVM.
    `rewinds` says whether it can put a clone back to its snapshot in place.
    """

    engine: str
    usable: bool
    version: str = ""
    accelerator: Accelerator | None = None
    reason: str = ""
    hint: str = ""
    identity: Mapping[str, str] = field(default_factory=dict)
    rewinds: bool = False


@dataclass(frozen=True, kw_only=True)
class VmExit:
    """How the VMM process ended: `code` or `signal`, never both; `killed_by_us` after `Vm.kill`."""

    code: int | None = None
    signal: int | None = None
    killed_by_us: bool = False


class Vm(Protocol):
    """One VMM process. Any thread may call any method. After the VMM's death all methods raise EngineError at once.

    Messages call the VM `name`. A standby takes the name of the clone that it becomes.
    """

    name: str

    @property
    def console_path(self) -> Path:
        """Return the file that receives the guest's serial console."""
        ...

    @property
    def vmm_log_path(self) -> Path:
        """Return the file that receives what the VMM prints."""
        ...

    @property
    def disk(self) -> Disk | None:
        """Return a clone's private scratch disk, None without one. The caller closes it once the VM is killed."""
        ...

    @property
    def namespace(self) -> Namespace | None:
        """Return the network namespace of the VM's plan."""
        ...

    def channel(self) -> socket.socket:
        """Return the byte channel to the agent: a connected stream socket, which the caller closes.

        QEMU returns at once, and the agent reads later what is written before the guest runs. Firecracker connects to
        its vsock socket, and waits until the guest listens.
        """
        ...

    def pause(self) -> None:
        """Stop the guest's CPUs."""
        ...

    def resume(self) -> None:
        """Let the guest's CPUs run again."""
        ...

    def snapshot(self, state: Path) -> None:
        """Stop a base and write its device state to `state`. `BootPlan.memory` then holds all of the guest's memory.

        Kill the VM afterwards, and do not touch its channel before.
        """
        ...

    def save(self, dest: SnapshotFiles) -> None:
        """Write memory, device state and disk of a running clone to new files. The clone runs on.

        Suspend the agent's session before, and take a new `channel` afterwards. Raise EngineError or HostError; no file
        is left then, and the clone runs on.
        """
        ...

    def kill(self) -> None:
        """Kill the VMM with SIGKILL and return at once. Idempotent."""
        ...

    def wait(self, timeout_s: float) -> VmExit:
        """Wait until the VMM process has ended. Raise EngineError at the deadline."""
        ...

    def explain(self) -> FcvmError:
        """Return why the VM is dead, with the tails of its console and log. Wait up to 2 s for its end."""
        ...

    def on_exit(self, callback: Callable[[VmExit], None]) -> None:
        """Call back once from a service thread when the VMM has ended, at once if it already has."""
        ...


class PreparedVm(Vm, Protocol):
    """The VM of a clone, which waits for `start` before it loads its snapshot."""

    def preconfigure(self) -> None:
        """Send the settings that the VMM accepts before `start`, which sends them otherwise. Raise EngineError."""
        ...

    def start(self) -> None:
        """Let the VM load its snapshot and run. Do nothing in a VM that was started. Raise EngineError."""
        ...


class Engine(Protocol):
    """A way to run VMs.

    `networks` are the networks that its clones can have, the default first. An engine that `joins_namespaces` runs its
    VMMs in the namespaces of their plans; other VMMs get descriptors. `vmm_mib` is the memory that one VMM needs
    beside the guest's.
    """

    networks: tuple[NetworkMode, ...]
    joins_namespaces: bool
    vmm_mib: int

    @property
    def name(self) -> str:
        """Return the engine's name as `--fcvm-engine` takes it."""
        ...

    def check(self, shape: VmShape) -> None:
        """Raise UsageProblem, with a hint, for a VM that this engine cannot make."""
        ...

    def private_networks(self, mode: NetworkMode) -> int:
        """Return how many private networks a clone can join, beside a network of this mode."""
        ...

    def probe(self, smoke: GuestFiles) -> EngineReport:
        """Report whether this engine works on this host. Boot `smoke` (no rootfs) to verify KVM. Cached on disk."""
        ...

    def boot(self, plan: BootPlan) -> Vm:
        """Start a base. Raise EngineError or HostError; a VM that fails leaves nothing."""
        ...

    def prepare(self, plan: RestorePlan) -> PreparedVm:
        """Spawn a clone's VMM and return at once. Raise EngineError or HostError; a VM that fails leaves nothing."""
        ...

    def base_arguments(self, shape: VmShape) -> tuple[str, ...]:
        """Return the part of a base's configuration that changes what a clone is. It enters the snapshot's key."""
        ...
