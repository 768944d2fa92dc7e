"""The cold path: boot a base, start the workload, wait for it, prepare it, quiesce, snapshot."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pytest_fcvm.clone.guest import Guest
from pytest_fcvm.clone.log import WorkloadLog, tail
from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.engine.disk import make_image
from pytest_fcvm.engine.protocol import BootPlan, SnapshotFiles, Vm
from pytest_fcvm.errors import EngineError, FcvmError, GuestError
from pytest_fcvm.guest.agent import Agent, start_session
from pytest_fcvm.guest.frames import PROTOCOL_BOOT_SECRET, new_secret
from pytest_fcvm.guest.link import CallFailed
from pytest_fcvm.host.archive import pack_path
from pytest_fcvm.host.clock import Deadline, monotonic
from pytest_fcvm.host.files import read_regular
from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.threads import ServiceThread
from pytest_fcvm.model.guest import ProcessSpec
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.results import Progress, Timeline
from pytest_fcvm.model.specs import MappedPath, Prepare
from pytest_fcvm.network.netns.attach import OpenNamespace, no_namespaces
from pytest_fcvm.network.ports.open import open_ports
from pytest_fcvm.ready import wait_until_ready
from pytest_fcvm.snapshot.identity import base_config
from pytest_fcvm.snapshot.inputs import SnapshotInputs
from pytest_fcvm.snapshot.namespace import base_namespace

__all__ = ["BASE_LOG", "abandon", "base_guest", "build_snapshot", "call_function", "snapshot_files"]

BASE_LOG = "base.log"
_MEMORY, _STATE, _DISK = "memory", "state", "disk"
_BOOT_S = 120.0  # emulated guests on a loaded machine, or on a host that is itself emulated
_SILENT_S = 30.0  # without console output: the boot hangs, and is tried once more
_QUIET_S, _QUIET_SHARE, _QUIET_DEADLINE_S = 0.1, 0.1, 3.0
_SETTLE_S = 0.5  # what the guest's kernel still has to do for the frozen workload is done once, not in every clone
_CALL_S = 60.0
_COPY_S = 600.0


def snapshot_files(directory: Path, inputs: SnapshotInputs, *, of_clone: bool = False) -> SnapshotFiles:
    """Return the files of a snapshot that an engine reads."""
    disk = directory / _DISK if inputs.shape.disk_mib else None
    return SnapshotFiles(
        memory=directory / _MEMORY, state=directory / _STATE, rootfs=inputs.rootfs, disk=disk, of_clone=of_clone
    )


@translating_emfile("the build of a snapshot")
def build_snapshot(
    inputs: SnapshotInputs, directory: Path, phase: Progress, open_namespace: OpenNamespace = no_namespaces
) -> dict[str, Any]:
    """Fill a snapshot's directory and return its facts: session secret, client port, timings in ms.

    Raise WorkloadExited, GuestTimeout, EngineError, or GuestError where a prepare function raised. The base is ended in
    every case.
    """
    started = monotonic()
    timings: dict[str, float] = {}
    with base_namespace(inputs, open_namespace) as namespace, _booted(inputs, directory, phase, namespace) as running:
        timings["boot_ms"] = _elapsed_ms(started)
        ports = open_ports(running)
        base = base_guest(inputs, running)
        phase("starting the workload")
        _start_workload(inputs, running.agent)
        phase(f"waiting until it is ready ({inputs.ready})")
        try:
            _wait_until_ready_and_quiet(inputs, base, running)
            timings["ready_ms"] = _elapsed_ms(started)
            if inputs.spec.prepare is not None:
                phase("preparing it")
                _prepare(inputs, base)
                _wait_until_ready_and_quiet(inputs, base, running)
            client_port = _client_port(inputs, base)
        except FcvmError as error:
            raise running.explain(error) from None
        phase("taking the snapshot")
        ports.close()
        secret = _quiesce(running, keeps_peer=inputs.is_relayed)
        stopped = monotonic()
        running.vm.snapshot(directory / _STATE)
        timings["save_ms"], timings["total_ms"] = _elapsed_ms(stopped), _elapsed_ms(started)
    return {
        "secret": secret.hex(),
        "client_port": client_port,
        "timings": timings,
        "base": str(running.timeline),
        "about": {**inputs.about(), "created_s": real_time_ns() // 10**9},
    }


@contextmanager
def _booted(
    inputs: SnapshotInputs, directory: Path, phase: Progress, namespace: Namespace | None
) -> Iterator[RunningVm]:
    disk = directory / _DISK if inputs.shape.disk_mib else None
    if disk:
        make_image(disk, inputs.shape.disk_mib)
    plan = BootPlan(
        name="base",
        shape=inputs.shape,
        files=inputs.files,
        memory=directory / _MEMORY,
        disk=disk,
        namespace=namespace,
        metadata=inputs.spec.metadata,
    )
    timeline = Timeline(monotonic())
    phase("booting the kernel")
    try:
        running = _boot_once(inputs, plan, directory, timeline)
    except _BootHangs:
        phase("booting the kernel again (the first boot hung)")
        running = _boot_once(inputs, plan, directory, timeline)
    try:
        timeline.mark("boot", monotonic())
        _configure(inputs, running.agent)
        timeline.mark("configure", monotonic())
        yield running
    finally:
        try:
            running.vm.kill()
            # Its channel stays untouched until it is gone: a stopped VMM still writes guest memory.
            running.vm.wait(_CALL_S)
        finally:
            running.close()


def _configure(inputs: SnapshotInputs, agent: Agent) -> None:
    try:
        copies = inputs.image.volumes  # of what the image has there
        agent.configure(base_config(inputs), timeout_s=_COPY_S if copies else _CALL_S)
    except CallFailed as error:
        if inputs.spec.sysctls and "sysctl" in error.message:
            error.hint = "correct sysctl=… or --fcvm-sysctl, or take another kernel with --fcvm-kernel"
        raise


class _BootHangs(EngineError):
    """A boot printed nothing for so long that it is tried again."""


def _boot_once(inputs: SnapshotInputs, plan: BootPlan, directory: Path, timeline: Timeline) -> RunningVm:
    plan.memory.unlink(missing_ok=True)
    hangs = threading.Event()
    with ExitStack() as undo:
        vm = inputs.engine.boot(plan)
        undo.callback(vm.kill)
        log = WorkloadLog(directory / BASE_LOG)
        undo.callback(log.close)
        try:
            with _watched(vm, hangs):
                agent = start_session(
                    vm.channel(), PROTOCOL_BOOT_SECRET, log_sink=log.append, timeout_s=_BOOT_S, explain=vm.explain
                )
        except FcvmError as error:
            abandon(vm, error)
            if hangs.is_set():
                raise _BootHangs(f"the guest's kernel printed nothing for {_SILENT_S:.0f} s") from None
            raise error from None
        undo.callback(agent.close)
        running = RunningVm(vm, agent, log, timeline, expected_exit_code=inputs.ready_joined.expected_exit_code)
        undo.pop_all()
        return running


@contextmanager
def _watched(vm: Vm, hangs: threading.Event) -> Iterator[None]:
    """Kill a VM whose console stays empty, and set `hangs`."""
    over = threading.Event()

    def watch() -> None:
        if not over.wait(_SILENT_S):
            _kill_if_silent(vm, hangs)

    thread = ServiceThread(watch, name="fcvm-boot")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _kill_if_silent(vm: Vm, hangs: threading.Event) -> None:
    with suppress(FileNotFoundError):
        if vm.console_path.stat().st_size:
            return
    hangs.set()
    vm.kill()


def abandon(vm: Vm, error: FcvmError) -> FcvmError:
    """Kill a VM whose agent did not answer; return the error with the console and the VMM log as evidence."""
    for title, path in (("console", vm.console_path), ("VMM log", vm.vmm_log_path)):
        with suppress(OSError):
            error.evidence.setdefault(title, tail(read_regular(path)))
    vm.kill()
    with suppress(EngineError):  # the first error is the one to report
        vm.wait(_CALL_S)
    return error


def base_guest(inputs: SnapshotInputs, running: RunningVm, name: str = "fcvm-base") -> Guest:
    """Return a VM that no test has as what `prepare` and `warm` get."""
    return Guest(
        name=name,
        spec=inputs.spec_before_tests,
        engine=inputs.engine.name,
        defaults=inputs.defaults,
        running=running,
    )


def _start_workload(inputs: SnapshotInputs, agent: Agent) -> None:
    for item in sorted(
        inputs.spec.map, key=lambda item: len(PurePosixPath(item.guest).parts)
    ):  # as mounts: outer first
        _copy_map(item, agent)
    defaults = inputs.defaults
    workload = ProcessSpec(argv=inputs.argv, env=dict(defaults.env), cwd=defaults.cwd, user=defaults.user)
    agent.start(workload, is_init=inputs.is_init, timeout_s=_CALL_S)


def _copy_map(item: MappedPath, agent: Agent) -> None:
    with agent.tar_in(item.guest, user=item.owner or "", hides=True, timeout_s=_COPY_S) as sink:
        pack_path(item.host, "map", sink.write, read_only=item.read_only, keeps_owner=True)


def _wait_until_ready_and_quiet(inputs: SnapshotInputs, base: Guest, running: RunningVm) -> None:
    """Wait for the service, then until its processes rest, 3 s at most.

    A server may listen before it serves (PostgreSQL answers "the database system is starting up"). What it does after
    its first answer is done once here, not in every clone.
    """
    wait_until_ready(base, inputs.ready, inputs.spec.ready_timeout_s)
    deadline, before = Deadline(_QUIET_DEADLINE_S), -1.0
    while not deadline.expired:
        used = float(running.agent.metrics(timeout_s=_CALL_S).get("workload_cpu_us", 0))  # a kernel may lack cgroups
        if before >= 0 and used - before < _QUIET_SHARE * _QUIET_S * 1e6:
            return
        before = used
        running.pause_for_exit(_QUIET_S)


def _prepare(inputs: SnapshotInputs, base: Guest) -> None:
    prepare = inputs.spec.prepare
    try:
        if isinstance(prepare, Prepare):
            call_function(prepare.func, base, "prepare")
        elif prepare is not None:
            base.succeed(prepare, timeout=inputs.spec.ready_timeout_s)
    finally:
        base.close_clients()


def call_function(function: Callable[[Guest], object], guest: Guest, what: str) -> None:
    """Call a user's `prepare` or `warm` function. Raise GuestError with its traceback, whatever it raises."""
    try:
        function(guest)
    except FcvmError:
        raise
    except Exception as error:
        name = getattr(function, "__name__", repr(function))
        raise GuestError(
            f"the {what} function {name} failed: {type(error).__name__}: {error}",
            hint="fix the function; its traceback is below",
            evidence={what: traceback.format_exc()},
        ) from error


def _client_port(inputs: SnapshotInputs, base: Guest) -> int | None:
    """Return a port that listens now: every clone must answer there before a test gets it. None without one."""
    if inputs.ready.port is not None and not inputs.ready.others:
        return inputs.ready.port
    tcp = (port for port, proto in inputs.image.exposed_ports if proto == "tcp")
    return next((port for port in tcp if not base.why_silent(port)), None)


def _quiesce(running: RunningVm, *, keeps_peer: bool) -> bytes:
    """Freeze the workload, wait until the guest's kernel rests, and return the secret that opens sessions of clones."""
    secret = new_secret()
    running.agent.sync(timeout_s=_COPY_S)  # what is written now, no clone has to write
    running.agent.quiesce(secret, keeps_peer=keeps_peer, timeout_s=_CALL_S)
    running.pause_for_exit(_SETTLE_S)
    return secret


def _elapsed_ms(since: float) -> float:
    return round((monotonic() - since) * 1000, 1)
