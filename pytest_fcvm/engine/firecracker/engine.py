"""The engine: probe this host's Firecracker, boot bases, restore clones."""

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
from pytest_fcvm.engine.vm import started
from pytest_fcvm.errors import EngineError, FcvmError, GuestTimeout, HostError, UsageProblem
from pytest_fcvm.host.own import os, shutil
from pytest_fcvm.host.supervisor.protocol import Spawner
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkMode
from pytest_fcvm.network.netns.server import NICS

__all__ = ["FirecrackerEngine"]

_INSTALL_HINT = "where KVM works: fcvm setup firecracker, or name one with --fcvm-firecracker PATH"
_EMULATE_HINT = "use --fcvm-engine qemu, which emulates where KVM does not work"
_NO_JAIL_HINT = "leave out --fcvm-jailer, and QEMU emulates where KVM does not work"
_SMOKE_SHAPE = VmShape(mem_mib=256, cpus=1)


class FirecrackerEngine:
    """Firecracker on KVM.

    `cache_dir` keeps what was found out about this host; with `jailed` each VM is in a jail. Every method may be called
    from any thread, `probe` first.
    """

    networks: tuple[NetworkMode, ...] = (NetworkMode.RELAY, NetworkMode.ROOTLESS, NetworkMode.BRIDGE)
    joins_namespaces = True  # it opens its cards, which are tap devices, by name

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
        """Raise UsageProblem for metadata without the network card that serves it."""
        if shape.metadata and not shape.network.uses_netns:
            raise UsageProblem(
                f"metadata is served by a network card, and the network {shape.network} has none here",
                hint="use --fcvm-network rootless, or bridge",
            )

    def private_networks(self, mode: NetworkMode) -> int:
        """Return how many private networks a clone can be on; its cards are in a namespace."""
        return len(NICS) - 1 if mode.uses_netns else 0

    def probe(self, smoke: GuestFiles) -> EngineReport:
        """Say whether Firecracker works here: it does when `smoke` has booted under it. Cached on disk.

        Never raises for what this host lacks: the report says it.
        """
        try:
            return self._probe(smoke)
        except FcvmError as error:
            return EngineReport(engine=self.name, usable=False, reason=error.message, hint=error.hint)

    def boot(self, plan: BootPlan) -> FirecrackerVm:
        """Start a base. Raise EngineError or HostError with Firecracker's own words."""
        kernel = {KERNEL: plan.files.vmlinux(), INITRAMFS: plan.files.initramfs}
        with self._new_vm_dir(plan.name) as home:
            home.put({**kernel, **drive_inputs(plan.files.rootfs, plan.disk)}, changed=(SCRATCH,))
            launched = self._launch(plan.name, home, plan.namespace)
        with ExitStack() as undo:
            undo.callback(launched.discard)
            calls = boot_calls(plan.shape, plan.metadata)
            vm = FirecrackerVm(plan.name, home, launched, self._ready().version, calls, memory=plan.memory)
            vm.start()
            undo.pop_all()
        return vm

    def restore(self, plan: RestorePlan) -> FirecrackerVm:
        """Start a clone, and return when it runs."""
        return started(self.prepare(plan))

    def prepare(self, plan: RestorePlan) -> FirecrackerVm:
        """Spawn a clone's Firecracker and return at once. It opens its API and then waits for `FirecrackerVm.start`."""
        files, version = plan.files, self._ready().version
        check_memory_file(files.memory, plan.shape.mem_mib)
        inputs = {STATE: files.state, MEMORY: files.memory, **drive_inputs(files.rootfs, None)}
        with ExitStack() as undo:
            with self._new_vm_dir(plan.name) as home:
                if disk := home.put_disk(files.disk) if files.disk else None:
                    undo.callback(disk.close)
                    del inputs[SCRATCH]
                home.put(inputs)
                launched = self._launch(plan.name, home, plan.namespace)
            undo.callback(launched.discard)
            vm = FirecrackerVm(
                plan.name,
                home,
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
        """Return what of the base's set-up changes what a clone is: part of the snapshot's key."""
        return key_arguments(shape)

    @contextmanager
    def _new_vm_dir(self, name: str) -> Iterator[VmDir]:
        """Make a directory for a VM, which is removed again when no VM comes of it."""
        directory = self._spawner.make_dir(name)
        try:
            yield JailDir(directory, self._jailer) if self._jailer else VmDir(directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _launch(self, name: str, home: VmDir, namespace: Namespace | None) -> Launched:
        passed = dict(home.descriptors)
        if namespace:
            passed |= {NET_FD: namespace.net} | ({USER_FD: namespace.user} if namespace.user is not None else {})
        with home.mounts() as mounts:
            if mounts is not None:
                passed[MOUNTS_FD] = mounts
            argv = enter_command(namespace, mounts=mounts is not None)
            argv += home.command(self._ready().binary, name)
            argv += ["--api-sock", API_SOCKET, "--level", "Warning", "--metrics-path", METRICS_FILE]
            directory = home.directory
            return launch(self._spawner, name, argv, wires=(), loose=(), files=passed, directory=directory)

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
        smoke.vmlinux()  # what fails in unpacking it says nothing about KVM
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
