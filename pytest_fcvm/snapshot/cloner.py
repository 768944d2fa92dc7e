"""How one machine is made of a snapshot: spawned, restored, given an identity, proven; or made ahead of its test."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace

from pytest_fcvm.clone.clone import Clone
from pytest_fcvm.clone.log import WorkloadLog
from pytest_fcvm.clone.machine import Machine, time_teller
from pytest_fcvm.engine.protocol import RestorePlan, Vm
from pytest_fcvm.engine.vm import discard
from pytest_fcvm.errors import EngineError, FcvmError, GuestError
from pytest_fcvm.guest.agent import start_session
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.limits import descriptors_told
from pytest_fcvm.model.guest import Identity
from pytest_fcvm.model.net import Cable, Namespace, PublishedPort
from pytest_fcvm.model.results import Timeline
from pytest_fcvm.model.specs import ReadyMode
from pytest_fcvm.network.addresses import fresh_identity
from pytest_fcvm.network.netns.attach import Enclose, no_enclosure, prepare_enclosed
from pytest_fcvm.network.ports.open import open_host_ports, open_ports
from pytest_fcvm.ready import ClientPath, wait_until_ready
from pytest_fcvm.snapshot.builder import BASE_LOG, abandon, snapshot_files
from pytest_fcvm.snapshot.inputs import Ingredients
from pytest_fcvm.snapshot.pool import Pooled
from pytest_fcvm.snapshot.standby import Spares
from pytest_fcvm.store import Entry

__all__ = ["Cloner"]

_RESTORE_S = 60.0
_ANSWER_S = 30.0

Room = AbstractContextManager[object]


class Cloner:
    """Makes machines of one snapshot. Whatever does not come to life leaves nothing."""

    def __init__(self, entry: Entry, parts: Ingredients, enclose: Enclose = no_enclosure) -> None:
        self._entry, self._parts, self._enclose = entry, parts, enclose
        self._spares = Spares(self._prepare, self._plan("spare"))
        self._lock = threading.Lock()
        self._ahead: set[Vm] = set()  # of machines that are being made ahead
        self._interrupted = False

    def close(self) -> None:
        """Give back what is kept ready for the next machine; running ones go on."""
        self._spares.close()

    def interrupt(self) -> None:
        """Kill the VMs that are being made ahead, so that their makers end; none will be made any more."""
        with self._lock:
            self._interrupted = True
            ahead = list(self._ahead)
        for vm in ahead:
            vm.kill()

    def enclose(self) -> Namespace | None:
        """Return a namespace for a machine whose VMM is to join it, the caller's to close until the machine stands."""
        engine = self._parts.engine
        if not (engine.joins_namespaces and self._parts.network.mode.is_enclosed):
            return None
        return self._enclose(engine.joins_namespaces, self._parts.network)

    def bring_up(
        self,
        name: str,
        ports: tuple[PublishedPort, ...],
        room: Room,
        cables: tuple[Cable, ...] = (),
        namespace: Namespace | None = None,
        watched: Callable[[Vm], object] = lambda _vm: None,
    ) -> Machine:
        """Return a machine that answers on the client's path. It gives the room back when it ends.

        `watched` is told of its VM as soon as there is one. Raise HostError, EngineError or GuestError.
        """
        timeline = Timeline(monotonic())
        if self._parts.spec.own_address:  # a port at the clone's own address is mapped when it is asked for
            ports = tuple(port for port in ports if port.host_port)
        with ExitStack() as held, ExitStack() as undo:
            held.enter_context(room)
            vm = self._spares.take(self._plan(name, cables, namespace))
            undo.callback(discard, vm)
            watched(vm)
            timeline.mark("spawn", monotonic())
            machine = self._meet(vm, name, cables, timeline)
            undo.pop_all()
            undo.callback(_discard, machine)
            machine.also_close([held.pop_all().close])
            undo.pop_all()
        try:
            with descriptors_told(name):
                self._open(machine, ports)
        except BaseException as error:
            if isinstance(error, FcvmError):
                machine.explain(error)
            _discard(machine)
            raise
        timeline.mark("ready", monotonic())
        self._spares.refill()  # not sooner: on few processors it would take the machine's own
        return machine

    def _open(self, machine: Machine, ports: tuple[PublishedPort, ...]) -> None:
        """Give a machine its ports, and wait until it answers on the client's path."""
        open_host_ports(machine, self._parts.spec.host_ports)
        ports_of_it = open_ports(machine, ports)
        number, parts = self._entry.facts["client_port"], self._parts
        if number is None or (parts.is_relayed and parts.ready.mode is not ReadyMode.HTTP):
            return  # a relayed port leads through the agent, which has answered
        ClientPath(ports_of_it.publish, parts.ready, number).prove(machine.pause_for_exit, _ANSWER_S)

    def bring_up_ahead(self, name: str, room: Room, is_wanted: Callable[[], bool]) -> Pooled:
        """Return a machine that is warm, frozen and stopped; as it is, as soon as a test is waiting for it."""
        with ExitStack() as watched:
            watch = lambda vm: watched.enter_context(self._interruptible(vm))  # noqa: E731
            machine = self.bring_up(name, self._parts.spec.publish, room, watched=watch)
            try:
                if not is_wanted():
                    self._warm_up(machine)
                if not is_wanted():
                    machine.agent.freeze(timeout_s=_ANSWER_S)
                    machine.vm.pause()
                    return Pooled(machine=machine, name=name, asleep=True)
            except BaseException:
                _discard(machine)
                raise
            return Pooled(machine=machine, name=name, asleep=False)

    @contextmanager
    def _interruptible(self, vm: Vm) -> Iterator[None]:
        with self._lock:
            if self._interrupted:
                raise EngineError(f"VM {vm.name} is not wanted any more")
            self._ahead.add(vm)
        try:
            yield
        finally:
            with self._lock:
                self._ahead.discard(vm)

    def wake(self, pooled: Pooled, since: float) -> Machine:
        """Let a machine that was made ahead go on, at the host's time of day, and return it.

        `since` is when it was asked for. Raise FcvmError when it has died meanwhile; nothing is left of it then.
        """
        machine = pooled.machine
        machine.timeline = Timeline(since)
        machine.timeline.mark("pool", monotonic())
        try:
            if pooled.asleep:
                machine.wake(self._parts.spec.clock)
        except BaseException:
            _discard(machine)
            raise
        machine.timeline.mark("wake", monotonic())
        return machine

    def _warm_up(self, machine: Machine) -> None:
        """Prove it ready by the condition that the base was, which runs the service's code for the first time."""

        def start(ports: tuple[PublishedPort, ...]) -> Machine:  # noqa: ARG001  they are mapped already
            return machine

        parts = self._parts
        target = Clone(
            name="ahead", spec=parts.spec_before_tests, engine=parts.engine.name, defaults=parts.defaults, start=start
        )
        ready = parts.ready
        if ready.others:  # that the image exposes; the base was asked which are served
            ready = replace(ready, port=self._entry.facts["client_port"], others=())
        wait_until_ready(target, ready, _ANSWER_S)
        warm = parts.spec.warm
        try:
            if isinstance(warm, str):
                target.succeed(warm)
            elif warm is not None:
                _call(warm, target)
        finally:
            target.close_clients()

    def _prepare(self, plan: RestorePlan) -> Vm:
        return prepare_enclosed(self._parts, plan, self._enclose)

    def _plan(
        self,
        name: str,
        cables: tuple[Cable, ...] = (),
        namespace: Namespace | None = None,
    ) -> RestorePlan:
        return RestorePlan(
            name=name,
            shape=self._parts.shape,
            files=snapshot_files(self._entry.path, self._parts, of_clone=self._entry.facts.get("of_clone", False)),
            cables=cables,
            namespace=namespace,
            metadata=self._parts.spec.metadata,
        )

    def _meet(self, vm: Vm, name: str, cables: tuple[Cable, ...], timeline: Timeline) -> Machine:
        with ExitStack() as undo:
            try:
                with descriptors_told(name):
                    log = WorkloadLog(vm.vmm_log_path.with_name("workload.log"), before=self._entry.file(BASE_LOG))
                    undo.callback(log.close)
                    identity = self._identity(name, cables)  # one that fails holds no channel
                    agent = start_session(
                        vm.channel(),
                        bytes.fromhex(self._entry.facts["secret"]),
                        identity=identity,
                        cables=cables,
                        log_sink=log.append,
                        timeout_s=_RESTORE_S,
                        explain=vm.explain,
                        tell_time=time_teller(self._parts.spec.clock),
                    )
                    undo.callback(agent.close)
            except FcvmError as error:
                raise abandon(vm, error) from None
            timeline.mark("agent", monotonic())
            machine = Machine(vm, agent, log, timeline, may_end_with=self._parts.ready_joined.may_end_with)
            undo.pop_all()
            return machine

    def _identity(self, name: str, cables: tuple[Cable, ...]) -> Identity:
        parts = self._parts
        return fresh_identity(
            name, parts.spec, parts.defaults.env, has_peer=not parts.is_relayed, hosts=_hosts_on(cables)
        )


def _discard(machine: Machine) -> None:
    """Close a machine whose maker failed: that failure is the one to tell."""
    with suppress(FcvmError):
        machine.close()


def _hosts_on(cables: tuple[Cable, ...]) -> list[str]:
    return [line for cable in cables for line in cable.hosts]


def _call(warm: Callable[[Clone], object], clone: Clone) -> None:
    try:
        warm(clone)
    except FcvmError:
        raise
    except Exception as error:
        raise GuestError(f"the warm function failed: {type(error).__name__}: {error}", hint="mend it") from error
