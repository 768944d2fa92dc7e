"""The Firecracker engine: probe this host's Firecracker, boot bases, prepare clones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pytest_fcvm.engine.cpu import read_cpu
from pytest_fcvm.engine.firecracker.installation import Installation, find_firecracker, inspect
from pytest_fcvm.engine.firecracker.jail import JailDir, Jailer, NotJailed, find_jailer
from pytest_fcvm.engine.firecracker.metrics import METRICS_FILE
from pytest_fcvm.engine.firecracker.requests import (
    API_SOCKET,
    INITRAMFS,
    KERNEL,
    MEMORY,
    MOUNTS_FD,
    NET_FD,
    SCRATCH,
    STATE,
    USER_FD,
    boot_calls,
    drive_inputs,
    enter_command,
    key_arguments,
    load_calls,
)
from pytest_fcvm.engine.firecracker.version import refuse_broken
from pytest_fcvm.engine.firecracker.vm import FirecrackerVm
from pytest_fcvm.engine.firecracker.vm_dir import VmDir
from pytest_fcvm.engine.kvm import SmokeTimeout, cached_or_probe, explain_missing_device
from pytest_fcvm.engine.launch import Launched, check_memory_file, launch
from pytest_fcvm.engine.protocol import Accelerator, BootPlan, EngineReport, GuestFiles, RestorePlan, VmShape
from pytest_fcvm.errors import EngineError, FcvmError, GuestTimeout, HostError, UsageProblem
from pytest_fcvm.host.own import os, shutil
from pytest_fcvm.host.supervisor.protocol import Spawner
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkMode
from pytest_fcvm.network.addresses import NICS

__all__ = ["FirecrackerEngine"]

_INSTALL_HINT = "where KVM works: fcvm setup firecracker, or name one with --fcvm-firecracker PATH"
_EMULATE_HINT = "use --fcvm-engine qemu, which emulates where KVM does not work"
_NO_JAIL_HINT = "leave out --fcvm-jailer, and QEMU emulates where KVM does not work"
_SMOKE_SHAPE = VmShape(mem_mib=256, cpus=1)
_VMM_MIB = 40


class FirecrackerEngine:
    """Firecracker on KVM. With `jailed`, each VM runs in a jail.

    `cache_dir` keeps what a probe finds out about this host. Call `probe` first. Any thread may call any method.
    """

    networks: tuple[NetworkMode, ...] = (NetworkMode.RELAY, NetworkMode.ROOTLESS, NetworkMode.BRIDGE)
    joins_namespaces = True  # Firecracker opens the tap devices of its NICs by name
    vmm_mib = _VMM_MIB

    def __init__(
        self,
        spawner: Spawner,
        cache_dir: Path,
        *,
        binary: Path | None = None,
        accelerator: Accelerator | None = None,
        jailed: bool = False,
    ) -> None:
        self._spawner, self._binary, self._wanted, self._jailed = spawner, binary, accelerator, jailed
        self._cache_dir, self._records = cache_dir, cache_dir / "engine"
        self._installation: Installation | None = None
        self._jailer: Jailer | None = None

    @property
    def name(self) -> str:
        """Return the engine's name as `--fcvm-engine` takes it."""
        return "firecracker"

    def check(self, shape: VmShape) -> None:
        """Raise UsageProblem for metadata without the NIC that serves it."""
        if shape.metadata and not shape.network.uses_netns:
            raise UsageProblem(
                f"metadata needs a NIC, and a VM of Firecracker has none on the network {shape.network}",
                hint="use --fcvm-network rootless, or bridge",
            )

    def private_networks(self, mode: NetworkMode) -> int:
        """Return how many private networks a clone can join; its NICs need a network namespace."""
        return len(NICS) - 1 if mode.uses_netns else 0

    def probe(self, smoke: GuestFiles) -> EngineReport:
        """Report whether Firecracker works on this host: whether `smoke` boots. Cached on disk.

        Never raise for what this host lacks: the report says it.
        """
        try:
            return self._probe(smoke)
        except FcvmError as error:
            return EngineReport(engine=self.name, usable=False, reason=error.message, hint=error.hint)

    def boot(self, plan: BootPlan) -> FirecrackerVm:
        """Start a base. Raise EngineError or HostError with Firecracker's message."""
        kernel = {KERNEL: plan.files.vmlinux(), INITRAMFS: plan.files.initramfs}
        with self._new_vm_dir(plan.name) as vm_dir:
            vm_dir.stage({**kernel, **drive_inputs(plan.files.rootfs, plan.disk)}, changed=(SCRATCH,))
            launched = self._launch(plan.name, vm_dir, plan.namespace)
        with ExitStack() as undo:
            undo.callback(launched.discard)
            calls = boot_calls(plan.shape, plan.metadata)
            vm = FirecrackerVm(plan.name, vm_dir, launched, self._ready().version, calls, memory=plan.memory)
            vm.start()
            undo.pop_all()
        return vm

    def prepare(self, plan: RestorePlan) -> FirecrackerVm:
        """Spawn a clone's Firecracker and return at once. It opens its API and waits for `FirecrackerVm.start`."""
        files, version = plan.files, self._ready().version
        check_memory_file(files.memory, plan.shape.mem_mib)
        inputs = {STATE: files.state, MEMORY: files.memory, **drive_inputs(files.rootfs, None)}
        with ExitStack() as undo:
            with self._new_vm_dir(plan.name) as vm_dir:
                if disk := vm_dir.stage_disk(files.disk) if files.disk else None:
                    undo.callback(disk.close)
                    del inputs[SCRATCH]
                vm_dir.stage(inputs)
                launched = self._launch(plan.name, vm_dir, plan.namespace)
            undo.callback(launched.discard)
            vm = FirecrackerVm(
                plan.name,
                vm_dir,
                launched,
                version,
                load_calls(plan.metadata),
                mem_mib=plan.shape.mem_mib,
                origin=files.memory,
                disk=disk,
                namespace=plan.namespace,
            )
            undo.pop_all()
        return vm

    def base_arguments(self, shape: VmShape) -> tuple[str, ...]:
        """Return the part of a base's API calls that changes what a clone is. It enters the snapshot's key."""
        return key_arguments(shape)

    @contextmanager
    def _new_vm_dir(self, name: str) -> Iterator[VmDir]:
        """Make a directory for a VM. Remove the directory when the block fails."""
        directory = self._spawner.make_dir(name)
        try:
            yield JailDir(directory, self._jailer) if self._jailer else VmDir(directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _launch(self, name: str, vm_dir: VmDir, namespace: Namespace | None) -> Launched:
        passed = dict(vm_dir.descriptors)
        if namespace:
            passed |= {NET_FD: namespace.net} | ({USER_FD: namespace.user} if namespace.user is not None else {})
        with vm_dir.mounts() as mounts:
            if mounts is not None:
                passed[MOUNTS_FD] = mounts
            argv = enter_command(namespace, mounts=mounts is not None)
            argv += vm_dir.command(self._ready().binary, name)
            argv += ["--api-sock", API_SOCKET, "--level", "Warning", "--metrics-path", METRICS_FILE]
            directory = vm_dir.directory
            return launch(self._spawner, name, argv, sockets=(), unconnected=(), files=passed, directory=directory)

    def _ready(self) -> Installation:
        if self._installation is None:
            raise EngineError("the engine was not probed, or its probe failed")
        return self._installation

    def _probe(self, smoke: GuestFiles) -> EngineReport:
        _refuse_foreign_host()
        binary = find_firecracker(self._binary, self._cache_dir)
        if binary is None:
            raise HostError("not installed", hint=_INSTALL_HINT)
        if self._wanted is Accelerator.TCG:
            raise HostError("Firecracker does not emulate", hint="use --fcvm-engine qemu, or --fcvm-accel auto")
        installation = inspect(binary, self._records / "firecracker.json")
        refuse_broken(installation.version)
        reason, hint = explain_missing_device()
        if reason:
            raise HostError(reason, hint=hint)
        self._jailer = find_jailer(binary, installation.version) if self._jailed else None
        self._installation = installation
        tried = f"{installation.digest}{' jailed' if self._jailed else ''}"
        records = self._records / "kvm-firecracker.json"
        fault = cached_or_probe(records, tried, smoke.kernel, lambda: self._smoke(smoke))
        if fault:
            self._installation = None
            raise HostError(fault, hint=_NO_JAIL_HINT if self._jailed else _EMULATE_HINT)
        cpu = read_cpu()
        return EngineReport(
            engine=self.name,
            usable=True,
            version=str(installation.version),
            accelerator=Accelerator.KVM,
            identity={
                "digest of firecracker": installation.digest,
                "version": str(installation.version),
                "cpu": cpu.model,
                "microcode": cpu.microcode,
                "host kernel": os.uname().release,
            },
        )

    def _smoke(self, smoke: GuestFiles) -> str:
        """Boot a kernel. Return why that failed, "" when its agent came up. Raise SmokeTimeout."""
        plan = BootPlan(name="smoke", shape=_SMOKE_SHAPE, files=smoke, memory=Path("/dev/null"))
        smoke.vmlinux()  # here, because a failure to unpack the kernel says nothing about KVM
        with ExitStack() as stack:
            try:
                vm = self.boot(plan)
                stack.callback(vm.kill)
                stack.enter_context(vm.channel())
            except GuestTimeout as error:
                raise SmokeTimeout(f"/dev/kvm cannot boot a kernel: {error.message}") from None
            except NotJailed:
                raise
            except FcvmError as error:
                return f"/dev/kvm cannot boot a kernel: {error.message}"
        return ""


def _refuse_foreign_host() -> None:
    host = os.uname()
    if (host.sysname, host.machine) != ("Linux", "x86_64"):
        raise HostError(f"Firecracker is used on Linux on x86_64, not on {host.sysname} on {host.machine}")
