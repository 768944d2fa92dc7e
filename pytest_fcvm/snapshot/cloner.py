"""How one VM is restored from a snapshot: spawned, loaded, personalised, verified; or prewarmed for a later test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace

from pytest_fcvm.clone.log import WorkloadLog
from pytest_fcvm.clone.running import RunningVm, clock_source
from pytest_fcvm.engine.abilities import as_rewindable
from pytest_fcvm.engine.protocol import PreparedVm, RestorePlan, Vm
from pytest_fcvm.engine.vm import discard
from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.guest.agent import start_session
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.model.guest import Identity
from pytest_fcvm.model.net import Attachment, Namespace, PublishedPort
from pytest_fcvm.model.results import Timeline
from pytest_fcvm.model.specs import ReadyMode
from pytest_fcvm.network.netns.attach import OpenNamespace
from pytest_fcvm.network.ports.open import open_ports, open_reverse_ports
from pytest_fcvm.ready import ClientPath, wait_until_ready
from pytest_fcvm.snapshot.builder import BASE_LOG, abandon, base_guest, call_function, snapshot_files
from pytest_fcvm.snapshot.identity import fresh_identity
from pytest_fcvm.snapshot.idle import IdleVms
from pytest_fcvm.snapshot.inputs import SnapshotInputs
from pytest_fcvm.snapshot.namespace import prepare_in_namespace
from pytest_fcvm.snapshot.pool import Pooled
from pytest_fcvm.snapshot.standby import Standby
from pytest_fcvm.store import Entry

__all__ = ["Cloner"]

_RESTORE_S = 60.0
_ANSWER_S = 30.0
_REWIND = "rewind"  # a phase

Admit = Callable[[], AbstractContextManager[object]]


class Cloner:
    """Restores VMs of one snapshot. A VM that does not start leaves nothing.

    With `rewinds`, VMs of ended clones are kept where `admit_idle` admits a VM that no test holds; else each VM ends
    with its clone. With `verifies`, rewound VMs are compared with the snapshot.
    """

    def __init__(
        self,
        entry: Entry,
        inputs: SnapshotInputs,
        open_namespace: OpenNamespace,
        admit_idle: Admit,
        *,
        rewinds: bool,
        verifies: bool,
    ) -> None:
        self._entry, self._inputs, self._open_namespace = entry, inputs, open_namespace
        self.idle = IdleVms(admit_idle, verifies=verifies)
        self._keep = self.idle.keep if rewinds else None
        self._standby = Standby(self._prepare, self._plan("standby"))
        self._lock = threading.Lock()
        self._prewarming: set[Vm] = set()  # those that are being made
        self._interrupted = False

    def close(self) -> None:
        """End the idle VMs and the standby VMM; running VMs run on."""
        self.idle.close()
        self._standby.close()

    def interrupt(self) -> None:
        """Kill the VMs that are being prewarmed, so that their threads end; refuse any further one."""
        with self._lock:
            self._interrupted = True
            vms = list(self._prewarming)
        for vm in vms:
            vm.kill()

    def open_namespace(self) -> Namespace | None:
        """Return a namespace for a VM whose VMM is to join it, the caller's to close until the VM stands."""
        engine = self._inputs.engine
        if not (engine.joins_namespaces and self._inputs.network.mode.uses_netns):
            return None
        return self._open_namespace(engine.joins_namespaces, self._inputs.network)

    def bring_up(
        self,
        name: str,
        ports: tuple[PublishedPort, ...],
        admit: Admit,
        attachments: tuple[Attachment, ...] = (),
        namespace: Namespace | None = None,
        watched: Callable[[Vm], object] = lambda _vm: None,
        may_freeze: bool = False,
    ) -> RunningVm:
        """Return a VM that answers on the client's path. `admit` returns its room, which it gives back when it ends.

        With `may_freeze`, its workload stays frozen where nothing is gained from letting it run. `watched` is called
        with its VM as soon as there is one. Raise HostError, EngineError or GuestError.
        """
        timeline = Timeline(monotonic())
        if self._inputs.spec.own_address:  # a port at the clone's own address is mapped when it is asked for
            ports = tuple(port for port in ports if port.host_port)
        with ExitStack() as held, ExitStack() as undo:
            vm = self._obtain(self._plan(name, attachments, namespace), admit, held, timeline)
            undo.callback(discard, vm)
            watched(vm)
            stays_frozen = may_freeze and _is_rewound(timeline) and self._needs_no_workload()
            running = self._meet(vm, name, attachments, timeline, stays_frozen=stays_frozen)
            undo.pop_all()
            undo.callback(_discard, running)
            running.add_cleanup([held.pop_all().close])
            undo.pop_all()
        try:
            with translating_emfile(name):
                self._open(running, ports)
        except BaseException as error:
            if isinstance(error, FcvmError):
                running.explain(error)
            _discard(running)
            raise
        timeline.mark("ready", monotonic())
        if not as_rewindable(running.vm):
            self._standby.refill()  # not sooner: on few CPUs it would take the clone's own
        return running

    def _obtain(self, plan: RestorePlan, admit: Admit, held: ExitStack, timeline: Timeline) -> Vm:
        """Return a started VM: an idle one, rewound, or that of another process. `held` gets its room."""
        with ExitStack() as undo:
            idle = None if plan.attachments or plan.namespace else self.idle.take()
            if idle:
                undo.callback(discard, idle)
            held.enter_context(admit())
            if idle and (rewound := self.idle.rewind(idle, plan.name)):
                undo.pop_all()
                timeline.mark(_REWIND, monotonic())
                return rewound
        vm = self._standby.take(plan)
        timeline.mark("spawn", monotonic())
        return vm

    def _open(self, running: RunningVm, ports: tuple[PublishedPort, ...]) -> None:
        """Give a VM its ports, and wait until it answers on the client's path."""
        open_reverse_ports(running, self._inputs.spec.host_ports)
        ports_of_it = open_ports(running, ports)
        if self._verifies_path():
            path = ClientPath(ports_of_it.publish, self._inputs.ready, self._entry.facts["client_port"])
            path.verify(running.pause_for_exit, _ANSWER_S)

    def _verifies_path(self) -> bool:
        """Say whether clones have a path to verify. A relayed port leads through the agent, which has answered."""
        inputs = self._inputs
        is_asked = not inputs.is_relayed or inputs.ready.mode is ReadyMode.HTTP
        return is_asked and self._entry.facts["client_port"] is not None

    def _needs_no_workload(self) -> bool:
        """Say whether a prewarmed clone is complete although its workload has not run."""
        spec = self._inputs.spec
        return not (self._verifies_path() or spec.hook or spec.warm)

    def prewarm(self, name: str, admit: Admit, is_wanted: Callable[[], bool]) -> Pooled:
        """Return a VM that is warm, frozen and paused; without that as soon as a test waits for it."""
        with ExitStack() as watched:
            watch = lambda vm: watched.enter_context(self._interruptible(vm))  # noqa: E731
            running = self.bring_up(name, self._inputs.spec.publish, admit, watched=watch, may_freeze=True)
            try:
                if not (running.is_frozen or is_wanted()):
                    self._warm_up(running)
                if running.is_frozen or not is_wanted():
                    if not running.is_frozen:
                        running.agent.freeze(timeout_s=_ANSWER_S)
                    running.vm.pause()
                    return Pooled(running=running, name=name, paused=True)
            except BaseException:
                _discard(running)
                raise
            return Pooled(running=running, name=name, paused=False)

    @contextmanager
    def _interruptible(self, vm: Vm) -> Iterator[None]:
        with self._lock:
            if self._interrupted:
                raise EngineError(f"VM {vm.name} is not wanted any more")
            self._prewarming.add(vm)
        try:
            yield
        finally:
            with self._lock:
                self._prewarming.discard(vm)

    def resume(self, pooled: Pooled, since: float) -> RunningVm:
        """Resume a prewarmed VM at the host's time of day, and return it.

        `since` is when the test asked for it. Raise FcvmError when the VM has died; nothing is left of it then.
        """
        running = pooled.running
        running.timeline = Timeline(since)
        running.timeline.mark("pool", monotonic())
        try:
            if pooled.paused:
                running.resume(self._inputs.spec.clock)
        except BaseException:
            _discard(running)
            raise
        running.timeline.mark("resume", monotonic())
        return running

    def _warm_up(self, running: RunningVm) -> None:
        """Run the service's code for the first time: verify the base's condition, and call the spec's `warm`."""
        inputs = self._inputs
        target = base_guest(inputs, running, "prewarmed")
        ready = inputs.ready
        if ready.others:  # that the image exposes; the base was asked which are served
            ready = replace(ready, port=self._entry.facts["client_port"], others=())
        if not _is_rewound(running.timeline):
            wait_until_ready(target, ready, _ANSWER_S)
        warm = inputs.spec.warm
        try:
            if isinstance(warm, str):
                target.succeed(warm)
            elif warm is not None:
                call_function(warm, target, "warm")
        finally:
            target.close_clients()

    def _prepare(self, plan: RestorePlan) -> PreparedVm:
        return prepare_in_namespace(self._inputs, plan, self._open_namespace)

    def _plan(
        self,
        name: str,
        attachments: tuple[Attachment, ...] = (),
        namespace: Namespace | None = None,
    ) -> RestorePlan:
        return RestorePlan(
            name=name,
            shape=self._inputs.shape,
            files=snapshot_files(self._entry.path, self._inputs, of_clone=self._entry.facts.get("of_clone", False)),
            attachments=attachments,
            namespace=namespace,
            metadata=self._inputs.spec.metadata,
        )

    def _meet(
        self, vm: Vm, name: str, attachments: tuple[Attachment, ...], timeline: Timeline, *, stays_frozen: bool
    ) -> RunningVm:
        with ExitStack() as undo:
            try:
                with translating_emfile(name):
                    log = WorkloadLog(vm.vmm_log_path.with_name("workload.log"), before=self._entry.file(BASE_LOG))
                    undo.callback(log.close)
                    # An identity that fails holds no channel.
                    identity = replace(self._identity(name, attachments), stays_frozen=stays_frozen)
                    agent = start_session(
                        vm.channel(),
                        bytes.fromhex(self._entry.facts["secret"]),
                        identity=identity,
                        attachments=attachments,
                        log_sink=log.append,
                        timeout_s=_RESTORE_S,
                        explain=vm.explain,
                        clock_ns=None if stays_frozen else clock_source(self._inputs.spec.clock),
                    )
                    undo.callback(agent.close)
            except FcvmError as error:
                raise abandon(vm, error) from None
            timeline.mark("agent", monotonic())
            expected = self._inputs.ready_joined.expected_exit_code
            running = RunningVm(vm, agent, log, timeline, expected_exit_code=expected, keep=self._keep)
            running.is_frozen = stays_frozen
            undo.pop_all()
            return running

    def _identity(self, name: str, attachments: tuple[Attachment, ...]) -> Identity:
        inputs = self._inputs
        return fresh_identity(
            name, inputs.spec, inputs.defaults.env, has_peer=not inputs.is_relayed, hosts=_hosts_of(attachments)
        )


def _is_rewound(timeline: Timeline) -> bool:
    """Say whether a VM has translated the service's code already, in an earlier clone."""
    return _REWIND in dict(timeline.phases)


def _discard(running: RunningVm) -> None:
    """Close a VM after a failure, which is the one to report."""
    with suppress(FcvmError):
        running.discard()


def _hosts_of(attachments: tuple[Attachment, ...]) -> list[str]:
    return [line for attachment in attachments for line in attachment.hosts]
