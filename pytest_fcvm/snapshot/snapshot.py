"""A finished snapshot, as fixtures and tests hold it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self

from pytest_fcvm.clone.clone import Clone, StartVm
from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.engine.protocol import Engine, EngineReport
from pytest_fcvm.errors import FcvmError, UsageProblem
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.own import check_owner, getpid, os
from pytest_fcvm.model.net import Attachment, PublishedPort
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

__all__ = ["Snapshot", "SnapshotRuntime"]

_VMM_MIB = 40  # what a QEMU needs for itself, and what part of the guest's memory a test is expected to write
_WRITTEN_SHARE = 8
_NAMES_S = 5.0
_NOT_A_NAME = re.compile(r"[^a-z0-9]+")

Admit = Callable[[int], AbstractContextManager[object]]


def _no_scratch() -> AbstractContextManager[Path]:
    raise UsageProblem("this process has no room for copies")


class Segment(Protocol):
    """What a clone needs of a private network."""

    def plug(self, name: str, wire: int | None = None) -> Attachment:
        """Return a attachment for a clone of that name; `wire` is a descriptor that carries its card's frames already."""
        ...

    def joined(self, name: str, tell: Callable[[tuple[str, ...]], object], set_link: Callable[[bool], object]) -> None:
        """Take note of a clone that is up.

        `tell` gives it the lines of /etc/hosts for who is on the network, `set_link` plugs its attachment in or out.
        """
        ...

    def unplug(self, name: str) -> None:
        """Take a clone off the network."""
        ...


@dataclass(kw_only=True)
class SnapshotRuntime:
    """What snapshots need of the process they live in.

    `admit(mem_mib)` waits for room in the host's memory and returns what gives it back; `admit_prewarmed(mem_mib)` does for
    a clone that no test has asked for, and raises NoRoomToPrewarm instead of waiting. `ahead` is how many of those are kept
    per snapshot, None as many as the tests seem to need; `makers` of them are made at once. `scratch()` gives a directory
    for a snapshot that does not outlive the process. `enclose(joined)` makes a network namespace for a VM. `born` and
    `failed` are told of every clone.
    """

    admit: Admit
    admit_prewarmed: Admit
    prewarmed: int | None = 0
    makers: int = 1
    scratch: Callable[[], AbstractContextManager[Path]] = field(default=_no_scratch)
    open_namespace: OpenNamespace = no_namespaces
    on_created: Callable[[Clone], None] = field(default=lambda _clone: None)
    failed: Callable[[VmSpec, FcvmError], None] = field(default=lambda _spec, _error: None)


class Snapshot:
    """A ready, frozen machine. `clone()` makes a live copy of it.

    `name` is what clones of it are called, with a number each; else they are called by their image.
    """

    def __init__(self, *, entry: Entry, parts: SnapshotInputs, runtime: SnapshotRuntime, name: str = "") -> None:
        self.key, self._name = entry.key, name
        self.spec = parts.spec
        self.facts: Mapping[str, Any] = entry.facts
        self._entry, self._parts, self._runtime = entry, parts, runtime
        self._cloner = Cloner(entry, parts, runtime.open_namespace)
        self._pool = self._make_pool() if self._can_pool() else None
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
        return self._parts.engine.name

    @property
    def lost(self) -> int:
        """Return how many clones died before a test took them; each was replaced."""
        return self._pool.lost if self._pool else 0

    @property
    def fault(self) -> FcvmError | None:
        """Return why a clone could not be made ahead, if that happened."""
        return self._pool.fault if self._pool else None

    def logs(self) -> str:
        """Return what the workload printed before the snapshot was taken."""
        return self._entry.file(BASE_LOG).read_bytes().decode("utf-8", "replace")

    def clone(
        self,
        *,
        name: str | None = None,
        publish: tuple[PublishedPort, ...] | None = None,
        networks: Sequence[Segment] = (),
    ) -> Clone:
        """Start a clone and return it when its service answers. Use it as a context manager, or close it.

        Only what a snapshot does not depend on can be chosen: the name, the published ports, the private networks; a
        clone for which none is may have been made ahead. Raise HostError without room for one more, EngineError or
        GuestError when it does not come to life, UsageProblem for more networks than the engine can join it to.
        """
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
                defaults=self._parts.defaults,
                start=_first(running, lambda ports: self._start(called, ports, networks)),
                copy=self._copy,
            )
        except FcvmError as error:
            self._runtime.failed(spec, error)
            raise
        try:
            if self._pool:
                self._pool.refill()
            self._runtime.on_created(clone)
        except BaseException:
            clone.close()
            raise
        return clone

    def verify(self, clone: Clone) -> None:
        """Wait until the spec's readiness condition holds in a clone, also where it could not in a base that was alone.

        Raise GuestTimeout when it does not in the time that the spec gives, WorkloadExited at once.
        """
        wait_until_ready(clone, self._parts.ready_joined, self.spec.ready_timeout_s)

    def move_to(self, directory: Path) -> dict[str, Any]:
        """Move the files of a snapshot of a running clone to a directory, for `reopen`, and return its facts."""
        for path in self._entry.path.iterdir():
            path.rename(directory / path.name)
        write_inputs(self._parts, directory)
        return dict(self.facts)

    @classmethod
    def reopen(cls, entry: Entry, engine: Engine, report: EngineReport, runtime: SnapshotRuntime) -> Snapshot:
        """Return what `move_to` has put into an entry. Raise HostError when it cannot run here any more."""
        parts = read_inputs(entry, engine, report)
        return cls(entry=entry, parts=parts, runtime=replace(runtime, prewarmed=0))

    def drain(self) -> None:
        """Give back the clones that no test has asked for yet."""
        if self._pool:
            self._pool.drain()

    def close(self) -> None:
        """Give back what is kept ready for the next clone; running clones go on. Idempotent.

        There are no further clones of a snapshot of a running clone: its files are gone.
        In a forked process nothing is done.
        """
        if getpid() != self._owner:
            return
        with ExitStack() as last:
            last.callback(self._owned.close)
            last.callback(self._cloner.close)
            if self._pool:
                self._pool.close()

    def _can_pool(self) -> bool:
        """Say whether clones can be made ahead: one that held a fixed host port would be in the way of those in use."""
        return self._runtime.prewarmed != 0 and all(port.host_port == 0 for port in self.spec.publish)

    def _make_pool(self) -> Pool:
        shop = self._runtime
        return Pool(self._prewarm, Depth(shop.prewarmed), shop.makers, self._cloner.interrupt)

    def _invent_name(self) -> str:
        stem = self._name or (self.spec.image or "").rsplit("/", 1)[-1].split("@")[0].split(":")[0].lower()
        return f"{_NOT_A_NAME.sub('-', stem).strip('-')[:40] or 'clone'}-{os.urandom(4).hex()}"

    def _copy(self, running: RunningVm, name: str) -> Snapshot:
        """Return a snapshot of what a machine of this one has become, which lasts until it is closed."""
        with translating_emfile(f"a copy of {running.vm.name}"), ExitStack() as owned:
            directory = owned.enter_context(self._runtime.scratch())
            facts = copy_running(running, self._parts, self.facts, directory)
            copied = Snapshot(
                entry=Entry(path=directory, key=directory.name, facts=facts),
                parts=as_copied(self._parts),
                runtime=replace(self._runtime, prewarmed=0),
                name=name,
            )
            copied._owned = owned.pop_all()
        return copied

    @property
    def _charge_mib(self) -> int:
        return _VMM_MIB + self.spec.mem_mib // _WRITTEN_SHARE

    def _check_networks(self, networks: Sequence[Segment]) -> None:
        engine, mode = self._parts.engine, self._parts.network.mode
        most = engine.private_networks(mode)
        if len(networks) > most:
            enclosed = next((other for other in engine.networks if engine.private_networks(other)), None)
            other = f"--fcvm-network {enclosed}, or " if enclosed else ""
            raise UsageProblem(
                f"a clone on {engine.name}, network {mode}, can be on {most or 'no'} private networks, "
                f"not {len(networks)}",
                hint="join it to fewer" if most else f"use {other}--fcvm-engine qemu",
            )

    def _start(self, name: str, ports: tuple[PublishedPort, ...], networks: Sequence[Segment]) -> RunningVm:
        plugged, attachments = ExitStack(), list[Attachment]()
        with translating_emfile(name), ExitStack() as undo, ExitStack() as passed_on:
            undo.push(plugged)
            namespace = self._cloner.open_namespace() if networks else None
            if namespace:
                plugged.callback(namespace.close)
            for number, network in enumerate(networks):
                wire = namespace.wires[number] if namespace and namespace.wires else None
                attachments.append(network.plug(name, wire))
                plugged.callback(network.unplug, name)
                if attachments[-1].end:
                    passed_on.enter_context(attachments[-1].end)
            room = self._runtime.admit(self._charge_mib)
            running = self._cloner.bring_up(name, ports, room, tuple(attachments), namespace)
            undo.callback(running.close)
            running.add_cleanup([plugged.close])
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
                partial(_tell_names, running, hosts_of(name, self.spec.host_ports), known, number),
                partial(running.vm.set_link, number),
            )

    def _prewarm(self, is_wanted: Callable[[], bool]) -> Pooled:
        with translating_emfile("a clone made ahead"):
            room = self._runtime.admit_prewarmed(self._charge_mib)
            return self._cloner.prewarm(self._invent_name(), room, is_wanted)

    def _take_prewarmed(self) -> tuple[RunningVm | None, str | None]:
        """Return a machine that was made ahead, awake, and its name; two times None where there is none."""
        asked = monotonic()
        while self._pool and (pooled := self._pool.take()):
            with suppress(FcvmError), translating_emfile(pooled.name):
                return self._cloner.wake(pooled, asked), pooled.name
            self._pool.lost += 1  # it died as it woke
        return None, None


def _tell_names(
    running: RunningVm, own: tuple[str, ...], known: list[tuple[str, ...]], number: int, lines: tuple[str, ...]
) -> None:
    """Tell a clone who is on one of its networks now; `known` has what it knows of each."""
    known[number] = lines
    running.agent.rename_hosts([*own, *chain.from_iterable(known)], timeout_s=_NAMES_S)


def _first(running: RunningVm | None, start: StartVm) -> StartVm:
    """Return a function that starts machines, of which the first is there already."""
    there = [running] if running else []
    return lambda ports: there.pop() if there else start(ports)
