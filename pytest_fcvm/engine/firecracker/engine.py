"""The engine: probe this host's Firecracker, boot bases, restore clones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from pytest_fcvm.engine.cpu import read_cpu
from pytest_fcvm.engine.disk import Disk
from pytest_fcvm.engine.firecracker.installation import Installation, find_firecracker, inspect
from pytest_fcvm.engine.firecracker.metrics import METRICS_FILE
from pytest_fcvm.engine.firecracker.requests import (
    API_SOCKET,
    DISK_FD,
    NET_FD,
    USER_FD,
    boot_calls,
    drive_links,
    enter_command,
    key_arguments,
    load_calls,
)
from pytest_fcvm.engine.firecracker.version import refuse_broken
from pytest_fcvm.engine.firecracker.vm import FirecrackerVm
from pytest_fcvm.engine.kvm import SmokeTimeout, explain_missing_device, recall_or_prove
from pytest_fcvm.engine.launch import Launched, check_memory_file, launch
from pytest_fcvm.engine.protocol import Accelerator, BootPlan, EngineReport, GuestFiles, MachineShape, RestorePlan
from pytest_fcvm.engine.spawner import Spawner
from pytest_fcvm.errors import EngineError, FcvmError, GuestTimeout, HostError
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkMode
from pytest_fcvm.net.router import CARDS

__all__ = ["FirecrackerEngine"]

_INSTALL_HINT = "where KVM works: fcvm setup firecracker, or name one with --fcvm-firecracker PATH"
_SMOKE_SHAPE = MachineShape(mem_mib=256, cpus=1)


class FirecrackerEngine:
    """Firecracker on KVM.

    `cache_dir` keeps what was found out about this host. Every method may be called from any thread, `probe` first.
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
    ) -> None:
        self._spawner, self._binary, self._wanted = spawner, binary, accelerator
        self._cache_dir, self._records = cache_dir, cache_dir / "engine"
        self._installation: Installation | None = None

    @property
    def name(self) -> str:
        """Return the engine's name as `--fcvm-engine` takes it."""
        return "firecracker"

    def private_networks(self, mode: NetworkMode) -> int:
        """Return how many private networks a clone can be on; its cards are in a namespace."""
        return len(CARDS) - 1 if mode.is_enclosed else 0

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
        launched = self._launch(plan.name, drive_links(plan.files.rootfs, plan.disk), namespace=plan.namespace)
        calls = boot_calls(plan.shape, plan.files.vmlinux(), plan.files.initramfs)
        vm = FirecrackerVm(plan.name, launched, self._ready().version, calls, memory=plan.memory)
        try:
            vm.start()
        except BaseException:
            vm.kill()
            raise
        return vm

    def restore(self, plan: RestorePlan) -> FirecrackerVm:
        """Start a clone, and return when it runs."""
        vm = self.prepare(plan)
        vm.start()
        return vm

    def prepare(self, plan: RestorePlan) -> FirecrackerVm:
        """Spawn a clone's Firecracker and return at once. It opens its API and then waits for `FirecrackerVm.start`."""
        files, version = plan.files, self._ready().version
        check_memory_file(files.memory, plan.shape.mem_mib)
        disk = Disk.copy_of(files.disk) if files.disk else None
        passed = {DISK_FD: disk.descriptor} if disk else {}
        links = drive_links(files.rootfs, Path(f"/proc/self/fd/{DISK_FD}") if disk else None)
        launched = self._launch(plan.name, links, passed, plan.namespace)
        calls, mem_mib = load_calls(files), plan.shape.mem_mib
        return FirecrackerVm(
            plan.name,
            launched,
            version,
            calls,
            mem_mib=mem_mib,
            origin=files.memory,
            disk=disk,
            namespace=plan.namespace,
        )

    def base_arguments(self, shape: MachineShape) -> tuple[str, ...]:
        """Return what of the base's set-up changes what a clone is: part of the snapshot's key."""
        return key_arguments(shape)

    def _launch(
        self,
        name: str,
        links: Mapping[str, Path],
        files: Mapping[int, int] | None = None,
        namespace: Namespace | None = None,
    ) -> Launched:
        directory = self._spawner.make_dir(name)
        for link, target in links.items():
            (directory / link).symlink_to(target)
        argv = [str(self._ready().binary), "--id", name, "--api-sock", API_SOCKET, "--level", "Warning"]
        argv += ["--metrics-path", METRICS_FILE]
        passed = dict(files or {})
        if namespace:
            argv = [*enter_command(namespace), *argv]
            passed |= {NET_FD: namespace.net} | ({USER_FD: namespace.user} if namespace.user is not None else {})
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
        self._installation = installation
        records = self._records / "kvm-firecracker.json"
        fault = recall_or_prove(records, installation.digest, smoke.kernel, lambda: self._smoke(smoke))
        if fault:
            self._installation = None
            raise HostError(fault, hint="use --fcvm-engine qemu, which emulates where KVM does not work")
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
            except FcvmError as error:
                return f"/dev/kvm cannot boot a kernel: {error.message}"
        return ""


def _refuse_foreign_host() -> None:
    host = os.uname()
    if (host.sysname, host.machine) != ("Linux", "x86_64"):
        raise HostError(f"Firecracker is used on Linux on x86_64, not on {host.sysname} on {host.machine}")
