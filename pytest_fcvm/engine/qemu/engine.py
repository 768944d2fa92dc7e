"""The QEMU engine: probe this host's QEMU, boot bases, prepare clones."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pytest_fcvm.engine.cpu import CpuIdentity, read_cpu
from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.engine.kvm import cached_or_probe, explain_missing_device
from pytest_fcvm.engine.launch import Launched, check_memory_file, launch, make_memory_file, open_state
from pytest_fcvm.engine.protocol import Accelerator, BootPlan, EngineReport, GuestFiles, RestorePlan, VmShape
from pytest_fcvm.engine.qemu.command import (
    AGENT_FD,
    DISK_FD,
    MONITOR_FD,
    NIC_FDS,
    STATE_FD,
    Platform,
    base_command,
    clone_command,
    key_arguments,
)
from pytest_fcvm.engine.qemu.installation import PROGRAM, Installation, find_qemu, inspect
from pytest_fcvm.engine.qemu.monitor import Command, Monitor
from pytest_fcvm.engine.qemu.smoke import boot_smoke
from pytest_fcvm.engine.qemu.tsc import stable_tsc_khz
from pytest_fcvm.engine.qemu.version import OLDEST
from pytest_fcvm.engine.qemu.vm import QemuVm
from pytest_fcvm.errors import EngineError, FcvmError, HostError, UsageProblem
from pytest_fcvm.host.own import os
from pytest_fcvm.host.sparse import copy_file
from pytest_fcvm.host.supervisor.protocol import Spawner
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkMode

__all__ = ["QemuEngine"]

_START_TIMEOUT_S = 20.0
_INSTALL_HINT = "apt-get install qemu-system-x86"
_VMM_MIB = 40
_SOCKETS = (MONITOR_FD, AGENT_FD)
# Once the state is loaded, before the guest runs. Each rewind empties the console's file, and drops what the host had
# sent to the old session.
_CHECKPOINT: Command = ("x-fcvm-checkpoint", {"discard-input": ["agent"], "truncate": ["console"]})


class QemuEngine:
    """QEMU's microvm machine. `accelerator` None uses KVM where it works, and emulates elsewhere.

    `binary` None uses the one of our wheel, unless `prefers_stock`, else the one on PATH.
    `cache_dir` keeps what a probe finds out about this host. Call `probe` first. Any thread may call any method.
    """

    networks: tuple[NetworkMode, ...] = (
        NetworkMode.USER,
        NetworkMode.RELAY,
        NetworkMode.ROOTLESS,
        NetworkMode.BRIDGE,
    )
    joins_namespaces = False
    vmm_mib = _VMM_MIB

    def __init__(
        self,
        spawner: Spawner,
        cache_dir: Path,
        *,
        binary: Path | None = None,
        accelerator: Accelerator | None = None,
        prefers_stock: bool = False,
    ) -> None:
        self._spawner, self._wanted = spawner, accelerator
        self._binary, self._prefers_stock = binary, prefers_stock
        self._records = cache_dir / "engine"
        self._platform: Platform | None = None
        self._copying = threading.Lock()
        self._copies: dict[Path, Path] = {}

    @property
    def name(self) -> str:
        """Return the engine's name as `--fcvm-engine` takes it."""
        return "qemu"

    def check(self, shape: VmShape) -> None:
        """Raise UsageProblem for a balloon or metadata.

        QEMU's balloon would return pages by punching holes into the memory file that all clones share.
        """
        if shape.balloon:
            raise UsageProblem(
                "the engine qemu has no balloon", hint="use --fcvm-engine firecracker, or less --fcvm-mem"
            )
        if shape.metadata:
            raise UsageProblem(
                "the engine qemu serves no metadata",
                hint="use --fcvm-engine firecracker, or a server of your own with --fcvm-host-port",
            )

    def private_networks(self, mode: NetworkMode) -> int:  # noqa: ARG002  the protocol's signature
        """Return how many private networks a clone can join."""
        return len(NIC_FDS) - 1

    def probe(self, smoke: GuestFiles) -> EngineReport:
        """Report whether QEMU works on this host, and with KVM only where `smoke` boots with KVM. Cached on disk.

        Never raise for what this host lacks: the report says it.
        """
        try:
            return self._probe(smoke)
        except FcvmError as error:
            return EngineReport(engine=self.name, usable=False, reason=error.message, hint=error.hint)

    def boot(self, plan: BootPlan) -> QemuVm:
        """Start a base and wait until QEMU has accepted its command line. Raise EngineError or HostError."""
        platform = self._ready()
        make_memory_file(plan.memory, plan.shape.mem_mib)
        with ExitStack() as undo:
            undo.callback(plan.memory.unlink, missing_ok=True)
            argv = base_command(platform, plan.shape, plan.files, plan.memory, disk=plan.disk)
            launched = launch(
                self._spawner, plan.name, argv, sockets=_SOCKETS, unconnected=NIC_FDS, files=_tap_of(plan.namespace)
            )
            undo.callback(launched.discard)
            monitor = _start_monitor(launched, _capabilities("x-ignore-shared", "events"))
            vm = QemuVm(plan.name, launched, monitor, launched.sockets[AGENT_FD], version=platform.version)
            vm.wait_until_started(_START_TIMEOUT_S)
            undo.pop_all()
            return vm

    def prepare(self, plan: RestorePlan) -> QemuVm:
        """Spawn a clone's QEMU and return at once. QEMU starts up and waits for `QemuVm.start`."""
        platform, files = self._ready(), plan.files
        check_memory_file(files.memory, plan.shape.mem_mib)
        if not (platform.version.opens_private_memory_read_only or os.access(files.memory, os.W_OK)):
            files = replace(files, memory=self._copy_of(files.memory))
        argv = clone_command(platform, plan.shape, files)
        with ExitStack() as undo, ExitStack() as lent:
            passed = {
                fd: attachment.packet_socket.fileno()
                for fd, attachment in zip(NIC_FDS[1:], plan.attachments, strict=False)
                if attachment.packet_socket
            }
            passed |= _tap_of(plan.namespace)
            disk = Disk.copy_of(files.disk) if files.disk else None
            if disk:
                undo.callback(disk.close)
                passed[DISK_FD] = disk.descriptor
            uri = f"file:{files.state}"
            if not platform.version.takes_state_by_path:
                passed[STATE_FD] = lent.enter_context(open_state(files.state))
                uri = f"fd:{STATE_FD}"
            launched = launch(self._spawner, plan.name, argv, sockets=_SOCKETS, unconnected=NIC_FDS, files=passed)
            undo.callback(launched.discard)
            monitor = _start_monitor(launched, _capabilities("x-ignore-shared"))
            begin = _first_commands(platform, plan, uri)
            vm = QemuVm(
                plan.name,
                launched,
                monitor,
                launched.sockets[AGENT_FD],
                version=platform.version,
                begin=begin,
                memory=files.memory,
                disk=disk,
                namespace=plan.namespace,
                rewinds=_CHECKPOINT in begin,
            )
            undo.pop_all()
            return vm

    def base_arguments(self, shape: VmShape) -> tuple[str, ...]:
        """Return the part of a base's command line that changes what a clone is. It enters the snapshot's key."""
        return key_arguments(self._ready(), shape)

    def _copy_of(self, memory: Path) -> Path:
        """Copy a memory file of a read-only cache into the run directory, once for all clones of this process."""
        with self._copying:
            if memory not in self._copies:
                copy = self._spawner.make_dir("memory") / memory.name
                copy_file(memory, copy)
                self._copies[memory] = copy
            return self._copies[memory]

    def _ready(self) -> Platform:
        if self._platform is None:
            raise EngineError("the engine was not probed, or its probe failed")
        return self._platform

    def _probe(self, smoke: GuestFiles) -> EngineReport:
        _refuse_foreign_host()
        binary = find_qemu(self._binary, prefers_stock=self._prefers_stock)
        if binary is None:
            raise HostError(f"{PROGRAM} is not installed", hint=_INSTALL_HINT)
        installation = inspect(binary, self._records / "qemu.json")
        _refuse_unfit(installation)
        accelerator, reason, hint = self._choose_accelerator(installation, smoke)
        cpu = read_cpu()
        khz = stable_tsc_khz(self._records / "tsc.json", cpu) if accelerator is Accelerator.TCG else 0
        self._platform = Platform(
            binary=binary,
            version=installation.version,
            accelerator=accelerator,
            tsc_khz=khz,
            rewinds=installation.rewinds and accelerator is Accelerator.TCG,
        )
        return EngineReport(
            engine=self.name,
            usable=True,
            version=str(installation.version),
            accelerator=accelerator,
            reason=reason,
            hint=hint,
            identity=_identity(installation, accelerator, cpu, khz),
            rewinds=self._platform.rewinds,
        )

    def _choose_accelerator(self, installation: Installation, smoke: GuestFiles) -> tuple[Accelerator, str, str]:
        """Return the accelerator, why it is not KVM, and a hint. Raise HostError where the wanted one does not work."""
        emulates = Accelerator.TCG in installation.accelerators
        if self._wanted is Accelerator.TCG:
            if not emulates:
                raise HostError(f"{installation.binary} is built without emulation (TCG)", hint=_INSTALL_HINT)
            return Accelerator.TCG, "emulation was asked for", ""
        reason, hint = self._try_kvm(installation, smoke)
        if not reason:
            return Accelerator.KVM, "", ""
        if self._wanted is Accelerator.KVM or not emulates:
            raise HostError(f"KVM does not work here: {reason}", hint=hint or "use --fcvm-accel tcg to emulate")
        return Accelerator.TCG, reason, hint

    def _try_kvm(self, installation: Installation, smoke: GuestFiles) -> tuple[str, str]:
        if Accelerator.KVM not in installation.accelerators:
            return f"{installation.binary} is built without KVM", _INSTALL_HINT
        reason, hint = explain_missing_device()
        if reason:
            return reason, hint
        records, digest = self._records / "kvm.json", installation.digest
        return cached_or_probe(records, digest, smoke.kernel, lambda: self._smoke(installation, smoke)), ""

    def _smoke(self, installation: Installation, smoke: GuestFiles) -> str:
        return boot_smoke(self._spawner, installation, smoke)


def _tap_of(namespace: Namespace | None) -> dict[int, int]:
    return {NIC_FDS[0]: namespace.tap} if namespace and namespace.tap is not None else {}


def _first_commands(platform: Platform, plan: RestorePlan, state: str) -> tuple[Command, ...]:
    """Return what lets a clone load its state and run. It can rewind where it has no network of the host's."""
    load: Command = ("migrate-incoming", {"uri": state})
    beyond_guest = plan.shape.egress or plan.attachments or plan.namespace
    return (_CHECKPOINT, load) if platform.rewinds and not beyond_guest else (load,)


def _start_monitor(launched: Launched, *commands: Command) -> Monitor:
    """Write QEMU's first commands while QEMU is still starting. It reads them later."""
    monitor = Monitor(launched.sockets[MONITOR_FD])
    monitor.send_early([("qmp_capabilities", {}), *commands])
    return monitor


def _capabilities(*names: str) -> Command:
    wanted = [{"capability": name, "state": True} for name in names]
    return "migrate-set-capabilities", {"capabilities": wanted}


def _refuse_foreign_host() -> None:
    host = os.uname()
    if (host.sysname, host.machine) != ("Linux", "x86_64"):
        raise HostError(
            f"QEMU is used on Linux on x86_64, not on {host.sysname} on {host.machine}", hint='-m "not fcvm"'
        )


def _refuse_unfit(installation: Installation) -> None:
    if installation.version < OLDEST:
        raise HostError(
            f"{installation.binary} is QEMU {installation.version}; {OLDEST[0]}.{OLDEST[1]} or newer is needed",
            hint="install a newer qemu-system-x86 (Debian 12 and Ubuntu 24.04 have one)",
        )
    if not installation.has_microvm:
        raise HostError(f"{installation.binary} has no microvm machine", hint=_INSTALL_HINT)


def _identity(installation: Installation, accelerator: Accelerator, cpu: CpuIdentity, tsc_khz: int) -> dict[str, str]:
    identity = {f"digest of {name}": digest for name, digest in installation.digests.items()}
    identity |= {"version": str(installation.version), "accelerator": str(accelerator), "cpu": cpu.model}
    if accelerator is Accelerator.KVM:
        return identity | {"microcode": cpu.microcode, "host kernel": os.uname().release}
    return identity | {"tsc kHz": str(tsc_khz)}
