"""The warm path: a clone of a finished snapshot."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

from pytest_fcvm.clone.clone import Clone
from pytest_fcvm.clone.log import WorkloadLog
from pytest_fcvm.clone.machine import Machine
from pytest_fcvm.engine.protocol import RestorePlan, Vm
from pytest_fcvm.errors import FcvmError, UsageProblem
from pytest_fcvm.guest.agent import start_session
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.model.net import PublishedPort
from pytest_fcvm.model.results import Timeline
from pytest_fcvm.model.specs import MachineSpec
from pytest_fcvm.ready import PROBE_PORT, ClientPath
from pytest_fcvm.snapshot.addresses import fresh_identity
from pytest_fcvm.snapshot.build import BASE_LOG, abandon, snapshot_files
from pytest_fcvm.snapshot.ingredients import Ingredients
from pytest_fcvm.snapshot.spares import Spares
from pytest_fcvm.store import Entry

__all__ = ["Snapshot", "Workshop"]

_RESTORE_S = 60.0
_ANSWER_S = 30.0
_VMM_MIB = 40  # what a QEMU needs for itself, and what part of the guest's memory a test is expected to write
_WRITTEN_SHARE = 8
_NOT_A_NAME = re.compile(r"[^a-z0-9]+")


@dataclass(kw_only=True)
class Workshop:
    """What snapshots need of the process they live in.

    `admit(mem_mib, first)` waits for room in the host's memory and returns what gives it back; `born` and `failed` are
    told of every clone.
    """

    admit: Callable[[int], AbstractContextManager[object]]
    born: Callable[[Clone], None] = field(default=lambda _clone: None)
    failed: Callable[[MachineSpec, FcvmError], None] = field(default=lambda _spec, _error: None)


class Snapshot:
    """A ready, frozen machine. `clone()` makes a live copy of it."""

    def __init__(self, *, entry: Entry, parts: Ingredients, workshop: Workshop) -> None:
        self.key = entry.key
        self.spec = parts.spec
        self.facts: Mapping[str, Any] = entry.facts
        self._entry, self._parts, self._workshop = entry, parts, workshop
        self._spares = Spares(parts.engine.prepare, self._plan("spare", parts.spec.publish))

    def __repr__(self) -> str:
        return f"<Snapshot {self.key[:12]} of {self.spec.image}>"

    @property
    def engine(self) -> str:
        """Return the name of the engine that runs its clones."""
        return self._parts.engine.name

    def logs(self) -> str:
        """Return what the workload printed before the snapshot was taken."""
        return self._entry.file(BASE_LOG).read_bytes().decode("utf-8", "replace")

    def clone(self, *, name: str | None = None, publish: tuple[PublishedPort, ...] | None = None) -> Clone:
        """Start a clone and return it when its service answers. Use it as a context manager, or close it.

        Only what a snapshot does not depend on can be chosen: the name and the published ports. Raise HostError without
        room for one more, EngineError or GuestError when it does not come to life.
        """
        spec = self.spec if publish is None else self.spec.merged({"publish": publish})
        called = name or self._invent_name()
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", called):
            raise UsageProblem(f"{called!r} is not a host name", hint="use letters a-z, digits and hyphens")
        try:
            clone = Clone(
                name=called,
                spec=spec,
                engine=self.engine,
                defaults=self._parts.defaults,
                start=lambda ports: self._start(called, ports),
            )
        except FcvmError as error:
            self._workshop.failed(spec, error)
            raise
        self._workshop.born(clone)
        return clone

    def close(self) -> None:
        """Give back what is kept ready for the next clone; running clones go on."""
        self._spares.close()

    def _invent_name(self) -> str:
        stem = (self.spec.image or "").rsplit("/", 1)[-1].split("@")[0].split(":")[0].lower()
        return f"{_NOT_A_NAME.sub('-', stem).strip('-')[:40] or 'clone'}-{os.urandom(4).hex()}"

    def _start(self, name: str, ports: tuple[PublishedPort, ...]) -> Machine:
        timeline = Timeline(monotonic())
        with ExitStack() as room:
            room.enter_context(self._workshop.admit(_VMM_MIB + self.spec.mem_mib // _WRITTEN_SHARE))
            vm = self._spares.take(self._plan(name, ports))
            timeline.mark("spawn", monotonic())
            path = self._open_client_path(vm)
            machine = self._meet(vm, name, timeline)
            machine.also_close([room.pop_all().close])
        try:
            if path:
                path.prove(machine.pause_for_exit, _ANSWER_S)
        except FcvmError as error:
            machine.explain(error)
            machine.close()
            raise
        timeline.mark("ready", monotonic())
        self._spares.refill()  # not sooner: on few processors it would take the clone's own
        return machine

    def _plan(self, name: str, ports: tuple[PublishedPort, ...]) -> RestorePlan:
        return RestorePlan(
            name=name,
            shape=self._parts.shape,
            files=snapshot_files(self._entry.path, self._parts.rootfs),
            ports=self._with_probed_ports(ports),
        )

    def _open_client_path(self, vm: Vm) -> ClientPath | None:
        number = self.facts["client_port"]
        if number is None:
            return None
        return ClientPath(vm.publish, self._parts.ready, number)

    def _meet(self, vm: Vm, name: str, timeline: Timeline) -> Machine:
        log = WorkloadLog(vm.console_path.with_name("workload.log"), before=self._entry.file(BASE_LOG))
        try:
            agent = start_session(
                vm.channel(),
                bytes.fromhex(self.facts["secret"]),
                identity=fresh_identity(name),
                log_sink=log.append,
                timeout_s=_RESTORE_S,
                explain=vm.explain,
            )
        except FcvmError as error:
            raise abandon(vm, log, error) from None
        timeline.mark("agent", monotonic())
        return Machine(vm, agent, log, vm, timeline)

    def _with_probed_ports(self, ports: tuple[PublishedPort, ...]) -> tuple[PublishedPort, ...]:
        service = self.facts["client_port"]
        if service is None:
            return ports
        mapped = {port.guest_port for port in ports if port.proto == "tcp"}
        return (*ports, *(PublishedPort(guest_port=port) for port in (service, PROBE_PORT) if port not in mapped))
