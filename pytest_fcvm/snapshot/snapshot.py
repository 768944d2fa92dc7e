"""A finished snapshot, as fixtures and tests hold it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pytest_fcvm.clone.clone import Clone, StartVm
from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.engine.abilities import set_link
from pytest_fcvm.engine.protocol import Engine, EngineReport
from pytest_fcvm.errors import FcvmError, UsageProblem
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.own import check_owner, getpid, os
from pytest_fcvm.model.net import Attachment, PublishedPort, Segment
from pytest_fcvm.model.specs import VmSpec
from pytest_fcvm.network.addresses import hosts_of
from pytest_fcvm.network.netns.attach import OpenNamespace, no_namespaces
from pytest_fcvm.ready import wait_until_ready
from pytest_fcvm.snapshot.builder import BASE_LOG
from pytest_fcvm.snapshot.cloner import Cloner
from pytest_fcvm.snapshot.copies import as_copied, copy_running
from pytest_fcvm.snapshot.inputs import SnapshotInputs
from pytest_fcvm.snapshot.pool import Depth, Pool, Pooled
from pytest_fcvm.snapshot.saved import read_inputs, write_inputs
from pytest_fcvm.store import Entry

__all__ = ["OpenSnapshot", "SnapshotRuntime"]

# The part of the guest's memory that a test is expected to write.
_WRITTEN_SHARE = 8
_NAMES_S = 5.0
_NOT_A_NAME = re.compile(r"[^a-z0-9]+")

Admit = Callable[[int], AbstractContextManager[object]]


def _no_scratch() -> AbstractContextManager[Path]:
    raise UsageProblem("this process has no room for copies")


@dataclass(kw_only=True)
class SnapshotRuntime:
    """What snapshots need of the process they are open in.

    `admit(mem_mib)` waits for room in the host's memory and returns a context that holds it. `admit_prewarmed(mem_mib)`
    does so for a clone that no test has asked for; it raises NoRoomToPrewarm instead of waiting. The pool of a snapshot
    has `pool_size` clones, or as many as the tests seem to need (None); `makers` of them are made at once. With
    `rewinds`, the VMs of ended clones are kept for later clones where their engine can rewind them; with
    `verifies_rewinds`, each is then compared with the snapshot. `scratch()` returns a context with a directory for a
    snapshot that ends with the process. `open_namespace(joined, network)` makes a network namespace for a VM.
    `on_created` is called with every clone, `on_failed` where there is none.
    """

    admit: Admit
    admit_prewarmed: Admit
    pool_size: int | None = 0
    makers: int = 1
    rewinds: bool = True
    verifies_rewinds: bool = False
    scratch: Callable[[], AbstractContextManager[Path]] = field(default=_no_scratch)
    open_namespace: OpenNamespace = no_namespaces
    on_created: Callable[[Clone], None] = field(default=lambda _clone: None)
    on_failed: Callable[[VmSpec, FcvmError], None] = field(default=lambda _spec, _error: None)


class OpenSnapshot:
    """A snapshot that this process has open, with its pool and its standby VMM.

    Clones are called by `name` and a number, or by their image and a number.
    """

    def __init__(self, *, entry: Entry, inputs: SnapshotInputs, runtime: SnapshotRuntime, name: str = "") -> None:
        self.key, self._name = entry.key, name
        self.spec = inputs.spec
        self.facts: Mapping[str, Any] = entry.facts
        self.entry, self.inputs, self._runtime = entry, inputs, runtime
        self._cloner = Cloner(
            entry,
            inputs,
            runtime.open_namespace,
            self._admit_idle,
            rewinds=runtime.rewinds,
            verifies=runtime.verifies_rewinds,
        )
        self.pool = self._make_pool() if self._can_pool() else None
        self._owned = ExitStack()
        self._owner = getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Snapshot {self._name or self.key[:12]} of {self.spec.image}>"

    @property
    def engine(self) -> str:
        """Return the name of the engine that runs its clones."""
        return self.inputs.engine.name

    @property
    def lost(self) -> int:
        """Return how many prewarmed clones died before a test took them. Each was replaced."""
        return self.pool.lost if self.pool else 0

    @property
    def rewound(self) -> int:
        """Return how many clones took over the VM of an earlier one."""
        return self._cloner.idle.rewound

    @property
    def has_idle(self) -> bool:
        """Say whether a VM waits to be rewound for the next clone."""
        return self._cloner.idle.count > 0

    @property
    def rewinds_failed(self) -> int:
        """Return how many VMs could not be rewound. A new process took the place of each."""
        return self._cloner.idle.failed

    @property
    def fault(self) -> FcvmError | None:
        """Return why a clone could not be prewarmed, if that happened."""
        return self.pool.fault if self.pool else None

    def logs(self) -> str:
        """Return what the workload printed before the snapshot was taken."""
        return self.entry.file(BASE_LOG).read_bytes().decode("utf-8", "replace")

    def clone(
        self,
        *,
        name: str | None = None,
        publish: tuple[PublishedPort, ...] | None = None,
        networks: Sequence[Segment] = (),
    ) -> Clone:
        """Start a clone, as `pytest_fcvm.Snapshot` says. Call `on_created`, or `on_failed` where it does not start."""
        check_owner(self._owner)
        self._check_networks(networks)
        spec = self.spec if publish is None else self.spec.merged({"publish": publish})
        if name is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name):
            raise UsageProblem(f"{name!r} is not a host name", hint="use letters a-z, digits and hyphens")
        running, called = (None, name) if name or networks or publish is not None else self._take_prewarmed()
        called = called or self._invent_name()
        try:
            clone = Clone(
                name=called,
                spec=spec,
                engine=self.engine,
                defaults=self.inputs.defaults,
                start=_once(running, lambda ports: self._start(called, ports, networks)),
                take_snapshot=self._copy,
            )
        except FcvmError as error:
            self._runtime.on_failed(spec, error)
            raise
        try:
            if self.pool:
                self.pool.refill()
            self._runtime.on_created(clone)
        except BaseException:
            clone.close()
            raise
        return clone

    def verify(self, clone: Clone) -> None:
        """Wait until the spec's readiness condition holds in a clone that depends on others: its base was alone.

        Raise GuestTimeout when it does not hold within the spec's `ready_timeout`, WorkloadExited at once.
        """
        try:
            wait_until_ready(clone, self.inputs.ready_joined, self.spec.ready_timeout_s)
        except FcvmError as error:
            self._runtime.on_failed(self.spec, error)
            raise

    def move_to(self, directory: Path) -> dict[str, Any]:
        """Move the files of a snapshot of a running clone to a directory, for `reopen`. Return its facts."""
        for path in self.entry.path.iterdir():
            path.rename(directory / path.name)
        write_inputs(self.inputs, directory)
        return dict(self.facts)

    @classmethod
    def reopen(cls, entry: Entry, engine: Engine, report: EngineReport, runtime: SnapshotRuntime) -> OpenSnapshot:
        """Open what `move_to` has put into an entry. Raise HostError when this host cannot run it any more."""
        inputs = read_inputs(entry, engine, report)
        return cls(entry=entry, inputs=inputs, runtime=replace(runtime, pool_size=0))

    def release(self) -> None:
        """End the prewarmed clones that no test has taken, and the idle VMs."""
        if self.pool:
            self.pool.release()
        self._cloner.idle.release()

    def close(self) -> None:
        """Release what is kept ready for the next clone; running clones run on. Idempotent.

        A snapshot of a running clone is deleted: it makes no further clones. Do nothing in a forked process.
        """
        if getpid() != self._owner:
            return
        with ExitStack() as last:
            last.callback(self._owned.close)
            last.callback(self._cloner.close)
            if self.pool:
                self.pool.close()

    def _can_pool(self) -> bool:
        """Say whether clones can be prewarmed: one with a fixed host port would block those in use."""
        return self._runtime.pool_size != 0 and all(port.host_port == 0 for port in self.spec.publish)

    def _make_pool(self) -> Pool:
        runtime = self._runtime
        return Pool(
            self._prewarm,
            Depth(runtime.pool_size),
            runtime.makers,
            self._cloner.interrupt,
            lambda: self._cloner.idle.rewound > 0,
        )

    def _invent_name(self) -> str:
        stem = self._name or (self.spec.image or "").rsplit("/", 1)[-1].split("@")[0].split(":")[0].lower()
        return f"{_NOT_A_NAME.sub('-', stem).strip('-')[:40] or 'clone'}-{os.urandom(4).hex()}"

    def _copy(self, running: RunningVm, name: str) -> OpenSnapshot:
        """Return a snapshot of a clone of this one as it is now. The files last until its `close`."""
        with translating_emfile(f"a copy of {running.vm.name}"), ExitStack() as owned:
            directory = owned.enter_context(self._runtime.scratch())
            facts = copy_running(running, self.inputs, self.facts, directory)
            copied = OpenSnapshot(
                entry=Entry(path=directory, key=directory.name, facts=facts),
                inputs=as_copied(self.inputs),
                runtime=replace(self._runtime, pool_size=0),
                name=name,
            )
            copied._owned = owned.pop_all()
        return copied

    def _admit_idle(self) -> AbstractContextManager[object]:
        return self._runtime.admit_prewarmed(self._charge_mib)

    @property
    def _charge_mib(self) -> int:
        return self.inputs.engine.vmm_mib + self.spec.mem_mib // _WRITTEN_SHARE

    def _check_networks(self, networks: Sequence[Segment]) -> None:
        engine, mode = self.inputs.engine, self.inputs.network.mode
        most = engine.private_networks(mode)
        if len(networks) > most:
            alternative = next((other for other in engine.networks if engine.private_networks(other)), None)
            other = f"--fcvm-network {alternative}, or " if alternative else ""
            raise UsageProblem(
                f"a clone on {engine.name}, network {mode}, can be on {most or 'no'} private networks, "
                f"not {len(networks)}",
                hint="join it to fewer" if most else f"use {other}--fcvm-engine qemu",
            )

    def _start(self, name: str, ports: tuple[PublishedPort, ...], networks: Sequence[Segment]) -> RunningVm:
        attached, attachments = ExitStack(), list[Attachment]()
        with translating_emfile(name), ExitStack() as undo, ExitStack() as passed_on:
            undo.push(attached)
            namespace = self._cloner.open_namespace() if networks else None
            if namespace:
                attached.callback(namespace.close)
            for number, network in enumerate(networks):
                packet_socket = namespace.packet_sockets[number] if namespace and namespace.packet_sockets else None
                attachments.append(network.plug(name, packet_socket))
                attached.callback(network.unplug, name)
                if attachments[-1].packet_socket:
                    passed_on.enter_context(attachments[-1].packet_socket)
            admit = partial(self._runtime.admit, self._charge_mib)
            running = self._cloner.bring_up(name, ports, admit, tuple(attachments), namespace)
            undo.callback(running.close)
            running.add_cleanup([attached.close])
            self._join(running, name, attachments, networks)
            undo.pop_all()
        return running

    def _join(
        self, running: RunningVm, name: str, attachments: Sequence[Attachment], networks: Sequence[Segment]
    ) -> None:
        known = [attachment.hosts for attachment in attachments]
        for number, network in enumerate(networks):
            network.joined(
                name,
                partial(_rename_hosts, running, hosts_of(name, self.spec.host_ports), known, number),
                partial(set_link, running.vm, number),
            )

    def _prewarm(self, is_wanted: Callable[[], bool]) -> Pooled:
        with translating_emfile("a prewarmed clone"):
            return self._cloner.prewarm(self._invent_name(), self._admit_idle, is_wanted)

    def _take_prewarmed(self) -> tuple[RunningVm | None, str | None]:
        """Return the VM and the name of a prewarmed clone that runs again, (None, None) where the pool is empty."""
        asked = monotonic()
        while self.pool and (pooled := self.pool.take()):
            with suppress(FcvmError), translating_emfile(pooled.name):
                return self._cloner.resume(pooled, asked), pooled.name
            self.pool.lost += 1  # it died as it resumed
        return None, None


def _rename_hosts(
    running: RunningVm, own: tuple[str, ...], known: list[tuple[str, ...]], number: int, lines: tuple[str, ...]
) -> None:
    """Write the members of one network into a clone's /etc/hosts. `known` has the lines of each of its networks."""
    known[number] = lines
    running.agent.rename_hosts([*own, *chain.from_iterable(known)], timeout_s=_NAMES_S)


def _once(running: RunningVm | None, start: StartVm) -> StartVm:
    """Return a function that returns `running` the first time, and starts VMs after that."""
    there = [running] if running else []
    return lambda ports: there.pop() if there else start(ports)
