"""The composition root: options in, snapshots out. Fixtures and the command line use the same one."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

from pytest_fcvm.clone import Clone
from pytest_fcvm.engine.choose import Choice, EngineContext, choose_engine
from pytest_fcvm.engine.protocol import Accelerator, GuestFiles
from pytest_fcvm.errors import EngineUnavailable, UsageProblem
from pytest_fcvm.failures import Failures, plain_message
from pytest_fcvm.guest.binary import resolve_agent
from pytest_fcvm.host.admission.admission import Admission, Ticket
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.files import leave_mark
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.own import check_owner, environment, getpid, os
from pytest_fcvm.host.paths import RunDir, cache_root, run_root, working_dir
from pytest_fcvm.host.supervisor.janitor import sweep, sweep_temporary
from pytest_fcvm.host.supervisor.supervisor import Supervisor
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.image.reference import parse_reference
from pytest_fcvm.image.rootfs import ROOTFS_FORMAT, build_rootfs
from pytest_fcvm.image.source import PullPolicy, resolve_image
from pytest_fcvm.kernel.initramfs import INITRAMFS_FORMAT, build_initramfs
from pytest_fcvm.kernel.sources import GuestKernel, resolve_kernel
from pytest_fcvm.kernel.vmlinux import extract_vmlinux
from pytest_fcvm.model.net import Namespace
from pytest_fcvm.model.specs import NetworkSpec, ReadyMode, ReadySpec, VmSpec
from pytest_fcvm.network.netns.client import Namespaces
from pytest_fcvm.network.private import Network
from pytest_fcvm.options import Options, named_programs, proxy_variables
from pytest_fcvm.pruning import make_room_beside
from pytest_fcvm.snapshot import Snapshot, SnapshotInputs, SnapshotRuntime, build_snapshot, choose_ready, snapshot_key
from pytest_fcvm.store import Entry, Store, canonical_digest, content_digest

__all__ = ["Harness"]

Announce = Callable[[str], None]
_Make = Callable[[Path, Announce], Mapping[str, Any]]
_Wanted = tuple[str, Hashable]  # the key of a snapshot, and what its clones are to be like

_ADMISSION_S = 300.0
_POOLS = 4  # snapshots of which a process keeps clones ahead
_ROOTFS = "rootfs.squashfs"
_INITRAMFS = "initramfs"
_VMLINUX = "vmlinux"


@dataclass(frozen=True, kw_only=True)
class _Image:
    digest: str
    config: ImageConfig
    rootfs: Entry


class Harness:
    """Everything one process needs to make machines, put together when it is first needed, taken apart by `close`.

    `shared_dir` is a directory that all processes of the run share: failures are remembered there. With
    `owns_shared` it goes with this process, however that ends. `announce` shows a person a line of progress. `born`
    is told of every clone.
    """

    def __init__(self, options: Options, *, shared_dir: Path, announce: Announce, owns_shared: bool = False) -> None:
        self._options, self._shared, self._announce = options, shared_dir, announce
        self.on_created: Callable[[Clone], object] = lambda _clone: None
        self._failures = Failures(shared_dir)
        self._resources = ExitStack()
        self._lock = threading.RLock()
        self._owner, self._also_removed = getpid(), shared_dir if owns_shared else None
        self._entries, self._images = dict[str, Entry](), dict[str, _Image]()
        self._snapshots: dict[_Wanted, Snapshot] = {}
        self._network_numbers = itertools.count(1)
        self._no_engine = ""
        self.who = ""  # the test that runs, named to those who wait for what it holds
        self._notes, self._timings = list[str](), list[str]()
        self._built = self._reused = self._clones = 0
        self._kept, self._live = set[str](), WeakSet[Clone]()

    def close(self) -> None:
        """Kill what still runs and remove this process's run directory. Does nothing in a forked child."""
        if getpid() == self._owner:
            self._resources.close()

    @translating_emfile("the snapshot")
    def snapshot(self, spec: VmSpec, who: str) -> Snapshot:
        """Return the snapshot of a spec: known to this process, found in the store, built here, or built by another.

        `who` (a test's id) is shown to those who wait for the build. A failure is remembered for the whole run: every
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
            parts = self._inputs(spec, who)
            if parts.network_note and parts.network_note not in self._notes:
                self._notes.append(parts.network_note)
            key = snapshot_key(parts, self.store)
            if key not in self._entries:
                self._entries[key] = self._find_or_build(key, parts, who)
                self._resources.enter_context(self._entries[key].in_use())
            wanted = key, spec.of_clones
            if wanted not in self._snapshots:
                snapshot = Snapshot(entry=self._entries[key], parts=parts, runtime=self._runtime)
                self._resources.callback(snapshot.close)
                self._snapshots[wanted] = snapshot
            self._keep_few_pools(wanted)
            return self._snapshots[wanted]

    @translating_emfile("a copy of the clone")
    def keep(self, clone: Clone, test: str, number: int = 0) -> None:
        """Save what a clone is now for `replay`, in place of what the test's clone of that number left before.

        Raise FcvmError when it cannot be copied; nothing is left of it then.
        """
        key = canonical_digest({"kept of": test, "number": number})
        collection = self.store.collection("snapshots")
        with clone.snapshot() as copied, collection.locked(key, test, self._announce):

            def make(directory: Path) -> Mapping[str, Any]:
                facts = copied.move_to(directory)
                return {**facts, "about": {**facts["about"], "test": test, "clone": clone.name}}

            collection.build(key, make)
            self._kept.add(key)

    @translating_emfile("the clone that was kept")
    def replay(self, entry: Entry) -> Snapshot:
        """Return a kept clone as a snapshot. Raise HostError when it cannot run here any more."""
        with self._lock:
            self._resources.enter_context(entry.in_use())
            snapshot = Snapshot.reopen(entry, self.choice.engine, self.choice.report, self._runtime)
            self._resources.callback(snapshot.close)
            return snapshot

    @translating_emfile("a private network")
    def network(self, *, seed: int = 0) -> Network:
        """Return a new private network, the caller's to close."""
        with self._lock:
            return Network(self.supervisor, next(self._network_numbers), seed=seed)

    def open_namespace(self, joined: bool, network: NetworkSpec) -> Namespace:
        """Return a network namespace for a VM, which joins it or not, the caller's to close. Raise HostError."""
        with self._lock:
            namespaces = self._namespaces
        return namespaces.open(network, joined=joined)

    def summary(self) -> dict[str, Any]:
        """Return what is told at the end of a run; made of plain values, so that a worker can send it."""
        faults = [snapshot.fault for snapshot in self._snapshots.values()]
        return {
            "engine": str(self.choice) if "choice" in self.__dict__ else self._no_engine,
            "built": self._built,
            "reused": self._reused,
            "clones": self._clones,
            "kept": len(self._kept),
            "replaced": sum(snapshot.lost for snapshot in self._snapshots.values()),
            "notes": self._notes + [f"a clone could not be made ahead: {fault.message}" for fault in faults if fault],
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
        """Return the process that starts all others and ends them with us."""
        self._options.check_resolved()  # networks, and clones that were kept, ask for no snapshot
        sweep(run_root())
        with ExitStack() as owned:
            run = owned.enter_context(RunDir())
            supervisor = owned.enter_context(Supervisor.start(run.path, also_removed=self._also_removed))
            self._resources.push(owned.pop_all())
        return supervisor

    @cached_property
    def choice(self) -> Choice:
        """Return the engine that was found to work. Raise EngineUnavailable with the reasons."""
        options = self._options
        context = EngineContext(
            spawner=self.supervisor,
            cache_dir=self.store.root,
            accelerator=None if options.accel == "auto" else Accelerator(options.accel),
            binaries=named_programs(qemu=options.qemu, firecracker=options.firecracker),
            jailed=options.jailer,
        )
        smoke = self._guest_files(None)
        try:
            return self._failures.once(
                "engine", lambda: choose_engine(options.engine, context, smoke, require_kvm=options.require_kvm)
            )
        except EngineUnavailable as error:
            self._no_engine = f"none ({plain_message(error)})"
            raise

    @cached_property
    def kernel(self) -> GuestKernel:
        """Return the kernel that guests boot; found, or downloaded once."""
        collection = self.store.collection("kernels")
        with collection.locked("kernel", "guest kernel", self._announce):
            return self._failures.once(
                "kernel",
                lambda: resolve_kernel(
                    option=self._options.kernel, kernels_dir=self.store.directory("kernels"), progress=self._announce
                ),
            )

    @cached_property
    def _initramfs(self) -> Entry:
        agent = resolve_agent()
        parts = {"agent": content_digest(agent), "kernel": self.kernel.digest, "format": INITRAMFS_FORMAT}
        key = canonical_digest(parts)

        def make(directory: Path, _note: Announce) -> Mapping[str, Any]:
            build_initramfs(agent=agent, kernel=self.kernel, dest=directory / _INITRAMFS)
            return {"kernel": self.kernel.release}

        return self._obtain("kernels", key, make, "guest kernel")[0]

    def _guest_files(self, rootfs: Path | None) -> GuestFiles:
        return GuestFiles(
            kernel=self.kernel.bzimage,
            initramfs=self._initramfs.file(_INITRAMFS),
            rootfs=rootfs,
            vmlinux=self._unpack_kernel,
        )

    def _unpack_kernel(self) -> Path:
        """Return the ELF kernel, unpacked once per kernel."""

        def make(directory: Path, _note: Announce) -> Mapping[str, Any]:
            extract_vmlinux(self.kernel.bzimage, directory / _VMLINUX)
            return {"kernel": self.kernel.release}

        key = canonical_digest({"vmlinux of": self.kernel.digest})
        return self._obtain("kernels", key, make, "guest kernel")[0].file(_VMLINUX)

    @cached_property
    def _namespaces(self) -> Namespaces:
        return self._resources.enter_context(closing(Namespaces(self.supervisor)))

    @cached_property
    def _admission(self) -> Admission:
        return self._resources.enter_context(closing(Admission(run_root(), self._options.max_clones)))

    @cached_property
    def _runtime(self) -> SnapshotRuntime:
        admission = self._admission
        return SnapshotRuntime(
            admit=self._admit,
            admit_prewarmed=lambda mem_mib: admission.admit_prewarmed(mem_mib, holder=f"a pool, ahead of {self.who}"),
            prewarmed=self._options.pool,
            makers=max(1, len(os.sched_getaffinity(0)) // int(environment().get("PYTEST_XDIST_WORKER_COUNT", "1"))),
            scratch=lambda: self.store.collection("snapshots").scratch(self.supervisor.run_dir),
            on_created=self._count_clone,
            open_namespace=self.open_namespace,
        )

    def _inputs(self, spec: VmSpec, who: str) -> SnapshotInputs:
        if spec.network.proxy:
            spec = replace(spec, env={**proxy_variables(), **spec.env})
        image = self._image(spec.image or "", who)
        ready = choose_ready(spec.ready, image.config)
        parts = SnapshotInputs(
            spec=spec,
            ready=ReadySpec(mode=ReadyMode.AGENT) if spec.needs else ready,
            ready_joined=ready,
            image=image.config,
            image_digest=image.digest,
            rootfs_key=image.rootfs.key,
            files=self._guest_files(image.rootfs.file(_ROOTFS)),
            kernel_digest=self.kernel.digest,
            kernel_release=self.kernel.release,
            initramfs_key=self._initramfs.key,
            engine=self.choice.engine,
            report=self.choice.report,
            network=spec.network.finalize(self.choice.engine.networks, self.choice.engine.name),
        )
        parts.engine.check(parts.shape)
        return parts

    def _image(self, text: str, who: str) -> _Image:
        if text not in self._images:
            name = canonical_digest({"image": text})
            self._failures.check(f"image-{name}")
            with self.store.collection("images").locked(name, who, self._speaker(text)) as phase:
                self._images[text] = self._failures.once(f"image-{name}", lambda: self._resolve_image(text, phase, who))
                self._resources.enter_context(self._images[text].rootfs.in_use())
        return self._images[text]

    def _resolve_image(self, text: str, phase: Announce, who: str) -> _Image:
        reference = parse_reference(text, base=working_dir())
        progress = self._speaker(text)
        phase("pulling the image")
        asked = self._shared / f"asked-{canonical_digest({'image': text})}"  # by another worker of this run
        pull = PullPolicy(self._options.pull)
        if pull is PullPolicy.ALWAYS and asked.exists():
            pull = PullPolicy.MISSING
        pulled = resolve_image(reference, images_dir=self.store.directory("images"), pull=pull, progress=progress)
        leave_mark(asked)
        key = canonical_digest({"image": pulled.digest, "format": ROOTFS_FORMAT})

        def make(directory: Path, _note: Announce) -> Mapping[str, Any]:
            build_rootfs(pulled, directory / _ROOTFS, progress=progress)
            return {"image": text, "digest": pulled.digest}

        rootfs, _ = self._obtain("images", key, make, who)
        pulled.discard()
        return _Image(digest=pulled.digest, config=pulled.config, rootfs=rootfs)

    def _find_or_build(self, key: str, parts: SnapshotInputs, who: str) -> Entry:
        announce = self._speaker(parts.spec.image or "")
        started = monotonic()

        def make(directory: Path, note: Announce) -> Mapping[str, Any]:
            def tell(text: str) -> None:
                note(text)
                announce(text)

            return build_snapshot(parts, directory, tell, self.open_namespace)

        entry, built = self._obtain("snapshots", key, make, who, fresh=self._options.rebuild)
        if built:
            self._built += 1
            announce(f"snapshot ready after {monotonic() - started:.1f} s")
            self._notes += make_room_beside(entry, self.store, self._options.cache_limit_mib)
        else:
            self._reused += 1
        return entry

    def _obtain(self, kind: str, key: str, make: _Make, who: str, *, fresh: bool = False) -> tuple[Entry, bool]:
        """Return an entry and whether it was built here. `fresh` builds it anew, once in a run.

        `make` gets a directory to fill, and a function to note its phase for those who wait.
        """
        collection = self.store.collection(kind)
        renewed = self._shared / f"renewed-{key}"
        if not fresh and (entry := collection.find(key)):
            return entry, False
        self._failures.check(f"{kind}-{key}")
        with collection.locked(key, who, self._announce) as phase:
            if (not fresh or renewed.exists()) and (entry := collection.find(key)):
                return entry, False
            phase("building")
            entry = self._failures.once(
                f"{kind}-{key}", lambda: collection.build(key, lambda directory: make(directory, phase))
            )
            leave_mark(renewed)
            return entry, True

    def _admit(self, mem_mib: int) -> Ticket:
        """Wait for room in the host's memory. Who already has a machine goes first, or two could wait for ever."""
        return self._admission.admit(
            mem_mib,
            holder=self.who,
            first=all(clone.closed for clone in self._live),
            deadline_s=_ADMISSION_S,
            on_wait=lambda: self._drain_pools(self._snapshots),
        )

    def _keep_few_pools(self, wanted: _Wanted) -> None:
        """Give back the clones ahead of tests that seem to be over: only the snapshots asked for last keep theirs."""
        self._snapshots[wanted] = self._snapshots.pop(wanted)  # dictionaries keep the order in which keys came
        self._drain_pools(list(self._snapshots)[:-_POOLS])

    def _drain_pools(self, snapshots: Iterable[_Wanted]) -> None:
        for wanted in list(snapshots):
            self._snapshots[wanted].drain()

    def _count_clone(self, clone: Clone) -> None:
        self._clones += 1
        self._live.add(clone)
        self.on_created(clone)
        if self._options.timings:
            self._timings.append(f"{clone.name}: {clone.timeline}")

    def _speaker(self, image: str) -> Announce:
        return lambda text: self._announce(f"{image}: {text}")
