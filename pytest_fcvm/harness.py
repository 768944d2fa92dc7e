"""The composition root: options in, snapshots out. Fixtures and the command line use the same one."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

from pytest_fcvm.clone import Clone
from pytest_fcvm.engine.choose import Choice, EngineContext, choose_engine
from pytest_fcvm.engine.protocol import Accelerator
from pytest_fcvm.errors import EngineUnavailable, FcvmError, UsageProblem
from pytest_fcvm.failures import Failures, plain_message
from pytest_fcvm.host.admission.admission import Admission
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.own import check_owner, environment, getpid, os
from pytest_fcvm.host.paths import RunDir, cache_root, run_root
from pytest_fcvm.host.supervisor.janitor import sweep, sweep_temporary
from pytest_fcvm.host.supervisor.supervisor import Supervisor
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.results import Progress
from pytest_fcvm.model.specs import NetworkSpec, VmSpec
from pytest_fcvm.network.netns.client import Namespaces
from pytest_fcvm.network.private import Network
from pytest_fcvm.options import Options, named_programs
from pytest_fcvm.provision import Provision
from pytest_fcvm.snapshot import OpenSnapshot, OpenSnapshots, SnapshotRuntime, snapshot_key
from pytest_fcvm.store import Entry, Store, canonical_digest

__all__ = ["Harness"]

_ADMISSION_S = 300.0


class Harness:
    """Everything one process needs to start clones. Each part is made when it is first needed; `close` ends them all.

    `shared_dir` is a directory that all processes of the run share: failures are recorded there. With `owns_shared` it
    is removed with this process, however the process ends. `announce` shows a line of progress. `on_created` and
    `on_failed` are called for every clone of this process, one call at a time, in the thread that asked for the clone.
    """

    def __init__(self, options: Options, *, shared_dir: Path, announce: Progress, owns_shared: bool = False) -> None:
        self._options, self._shared, self._announce = options, shared_dir, announce
        self.on_created: Callable[[Clone], object] = lambda _clone: None
        self.on_failed: Callable[[VmSpec, FcvmError], object] = lambda _spec, _error: None
        self.who = ""  # the running test: those who wait for what it holds are shown its name
        self._failures = Failures(shared_dir)
        self._resources = ExitStack()
        self._lock, self._reporting = threading.RLock(), threading.RLock()
        self._owner, self._extra_dir = getpid(), shared_dir if owns_shared else None
        self._entries, self._opened = dict[str, Entry](), OpenSnapshots()
        self._network_numbers = itertools.count(1)
        self._no_engine = ""
        self._notes, self._timings = list[str](), list[str]()
        self._clones, self._kept, self._live = 0, set[str](), WeakSet[Clone]()

    def close(self) -> None:
        """Kill what still runs and remove this process's run directory. Do nothing in a forked child."""
        if getpid() == self._owner:
            with self._resources:
                self._opened.close()

    @translating_emfile("the snapshot")
    def snapshot(self, spec: VmSpec, who: str) -> OpenSnapshot:
        """Return the snapshot of a spec: known to this process, found in the store, or built.

        `who` (a test's id) is shown to those who wait for the build. A failure is recorded for the whole run: every
        later call raises it at once.
        """
        check_owner(self._owner)
        self._options.check_resolved()
        with self._lock:
            self.who = self.who or who
            if spec.image is None:
                raise UsageProblem(
                    "no image is set", hint='give --fcvm-image IMAGE, or mark the test with fcvm(image="nginx:latest")'
                )
            inputs = self.provision.inputs(spec, who, lambda: self.choice)
            if inputs.network_note and inputs.network_note not in self._notes:
                self._notes.append(inputs.network_note)
            key = snapshot_key(inputs, self.store)
            if key not in self._entries:
                self._entries[key] = self.provision.snapshot(key, inputs, who, self.open_namespace)
            wanted: Hashable = key, spec.clone_settings
            return self._opened.get(
                wanted, lambda: OpenSnapshot(entry=self._entries[key], inputs=inputs, runtime=self._runtime)
            )

    @translating_emfile("a copy of the clone")
    def keep(self, clone: Clone, test: str, number: int = 0) -> None:
        """Save a clone as it is now for `replay`, in place of the test's earlier clone with this number.

        Raise FcvmError when it cannot be copied; nothing is left of the copy then.
        """
        key = canonical_digest({"kept of": test, "number": number})
        collection = self.store.collection("snapshots")
        with clone.snapshot() as copied, collection.locked(key, test, self._announce):
            assert isinstance(copied, OpenSnapshot)

            def make(directory: Path) -> Mapping[str, Any]:
                facts = copied.move_to(directory)
                return {**facts, "about": {**facts["about"], "test": test, "clone": clone.name}}

            collection.build(key, make)
            self._kept.add(key)

    @translating_emfile("the clone that was kept")
    def replay(self, entry: Entry) -> OpenSnapshot:
        """Return a kept clone as a snapshot. Raise HostError when this host cannot run it any more."""
        with self._lock:
            self._resources.enter_context(entry.in_use())
            snapshot = OpenSnapshot.reopen(entry, self.choice.engine, self.choice.report, self._runtime)
            self._resources.callback(snapshot.close)
            return snapshot

    @translating_emfile("a private network")
    def network(self, *, seed: int = 0) -> Network:
        """Return a new private network, which the caller closes."""
        with self._lock:
            return Network(self.supervisor, next(self._network_numbers), seed=seed)

    def open_namespace(self, joined: bool, network: NetworkSpec) -> Namespace:
        """Return a network namespace for a VM, which runs in it if `joined`. The caller closes it. Raise HostError."""
        with self._lock:
            namespaces = self._namespaces
        return namespaces.open(network, joined=joined)

    def summary(self) -> dict[str, Any]:
        """Return the figures and notes for the end of a run, as plain values that a worker can send."""
        faults = [f"a clone could not be prewarmed: {fault.message}" for fault in self._opened.faults]
        return {
            "engine": str(self.choice) if "choice" in self.__dict__ else self._no_engine,
            "built": self.provision.built if "provision" in self.__dict__ else 0,
            "reused": self.provision.reused if "provision" in self.__dict__ else 0,
            "clones": self._clones,
            "kept": len(self._kept),
            "rewound": self._opened.rewound,
            "replaced": self._opened.lost,
            "notes": self._notes + faults + self._opened.doubts,
            "timings": self._timings,
        }

    # -- parts, each made when first needed

    @cached_property
    def store(self) -> Store:
        """Return the cache, swept of what killed builders left."""
        store = Store(cache_root(self._options.cache_dir), note=self._notes.append)
        for kind in ("images", "kernels", "snapshots"):
            sweep_temporary(store.directory(kind))
        return store

    @cached_property
    def supervisor(self) -> Supervisor:
        """Return the process that starts all others and ends them with this one."""
        self._options.check_resolved()  # networks, and clones that were kept, ask for no snapshot
        sweep(run_root())
        with ExitStack() as owned:
            run = owned.enter_context(RunDir())
            supervisor = owned.enter_context(Supervisor.start(run.path, extra_dir=self._extra_dir))
            self._resources.push(owned.pop_all())
        return supervisor

    @cached_property
    def choice(self) -> Choice:
        """Return the engine that works here. Raise EngineUnavailable with the reasons."""
        options = self._options
        context = EngineContext(
            spawner=self.supervisor,
            cache_dir=self.store.root,
            accelerator=None if options.accel == "auto" else Accelerator(options.accel),
            binaries=named_programs(qemu=options.qemu, firecracker=options.firecracker),
            prefers_stock=options.qemu == "stock",
            jailed=options.jailer,
        )
        smoke = self.provision.guest_files()
        try:
            return self._failures.once(
                "engine", lambda: choose_engine(options.engine, context, smoke, require_kvm=options.require_kvm)
            )
        except EngineUnavailable as error:
            self._no_engine = f"none ({plain_message(error)})"
            raise

    @cached_property
    def provision(self) -> Provision:
        """Return what finds or builds images, kernels and snapshots."""
        return Provision(
            self._options,
            self.store,
            self._failures,
            shared=self._shared,
            announce=self._announce,
            note=self._notes.append,
            hold=lambda entry: self._resources.enter_context(entry.in_use()),
        )

    @cached_property
    def _namespaces(self) -> Namespaces:
        return self._resources.enter_context(closing(Namespaces(self.supervisor)))

    @cached_property
    def _runtime(self) -> SnapshotRuntime:
        admission = self._resources.enter_context(closing(Admission(run_root(), self._options.max_clones)))
        workers = int(environment().get("PYTEST_XDIST_WORKER_COUNT", "1"))

        def report_created(clone: Clone) -> None:
            with self._reporting:
                self._clones += 1
                self._live.add(clone)
                if self._options.timings:
                    self._timings.append(f"{clone.name}: {clone.timeline}")
                self.on_created(clone)

        def report_failed(spec: VmSpec, error: FcvmError) -> None:
            with self._reporting:
                self.on_failed(spec, error)

        return SnapshotRuntime(
            admit=lambda mem_mib: admission.admit(
                mem_mib,
                holder=self.who,
                first=all(clone.closed for clone in self._live),  # who has a clone goes first, or two wait for ever
                deadline_s=_ADMISSION_S,
                on_wait=self._opened.release,
            ),
            admit_prewarmed=lambda mem_mib: admission.admit_prewarmed(mem_mib, holder=f"a pool, for {self.who}"),
            pool_size=self._options.pool,
            rewinds=self._options.rewind == "on",
            verifies_rewinds=self._options.verify_rewind,
            makers=max(1, len(os.sched_getaffinity(0)) // workers),
            scratch=lambda: self.store.collection("snapshots").scratch(self.supervisor.run_dir),
            open_namespace=self.open_namespace,
            on_created=report_created,
            on_failed=report_failed,
        )
