"""Provisioning: the image, the kernel and the snapshot of a spec, found in the store or built there under a lock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_fcvm.engine.choose import Choice
from pytest_fcvm.engine.protocol import GuestFiles
from pytest_fcvm.failures import Failures
from pytest_fcvm.guest.binary import resolve_agent
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.host.files import touch_marker
from pytest_fcvm.host.paths import working_dir
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.image.reference import parse_reference
from pytest_fcvm.image.rootfs import ROOTFS_FORMAT, build_rootfs
from pytest_fcvm.image.source import PullPolicy, resolve_image
from pytest_fcvm.kernel.initramfs import INITRAMFS_FORMAT, build_initramfs
from pytest_fcvm.kernel.sources import GuestKernel, resolve_kernel
from pytest_fcvm.kernel.vmlinux import extract_vmlinux
from pytest_fcvm.model.results import Progress
from pytest_fcvm.model.specs import ReadyMode, ReadySpec, VmSpec
from pytest_fcvm.network.netns.attach import OpenNamespace
from pytest_fcvm.options import Options, proxy_variables
from pytest_fcvm.pruning import free_space_beside
from pytest_fcvm.snapshot import SnapshotInputs, build_snapshot, choose_ready
from pytest_fcvm.store import Entry, Store, canonical_digest, content_digest

__all__ = ["Provision"]

_Make = Callable[[Path, Progress], Mapping[str, Any]]

_ROOTFS = "rootfs.squashfs"
_INITRAMFS = "initramfs"
_VMLINUX = "vmlinux"


@dataclass(frozen=True, kw_only=True)
class _Image:
    digest: str
    config: ImageConfig
    rootfs: Entry


class Provision:
    """What guests are made of. Each part is found or built once, and a failure is remembered for the whole run.

    `shared` is a directory that all processes of the run share. `announce` shows a line of progress, `note` a line of
    the summary. `hold` keeps an entry of the store from being removed while this process uses it.
    """

    def __init__(
        self,
        options: Options,
        store: Store,
        failures: Failures,
        *,
        shared: Path,
        announce: Progress,
        note: Progress,
        hold: Callable[[Entry], object],
    ) -> None:
        self._options, self._store, self._failures, self._shared = options, store, failures, shared
        self._announce, self._note, self._hold = announce, note, hold
        self._images: dict[str, _Image] = {}
        self.built = self.reused = 0  # snapshots

    @cached_property
    def kernel(self) -> GuestKernel:
        """Return the kernel that guests boot; found, or downloaded once."""
        with self._store.collection("kernels").locked("kernel", "guest kernel", self._announce):
            return self._failures.once(
                "kernel",
                lambda: resolve_kernel(
                    option=self._options.kernel,
                    kernels_dir=self._store.directory("kernels"),
                    progress=self._announce,
                ),
            )

    def guest_files(self, rootfs: Path | None = None) -> GuestFiles:
        """Return the files that an engine boots a guest from, with the image's root file system or without one."""
        return GuestFiles(
            kernel=self.kernel.bzimage,
            initramfs=self._initramfs.file(_INITRAMFS),
            rootfs=rootfs,
            vmlinux=self._unpack_kernel,
        )

    def inputs(self, spec: VmSpec, who: str, choose: Callable[[], Choice]) -> SnapshotInputs:
        """Return everything that the snapshot of a spec is built from.

        `who` (a test's id) is shown to those who wait for the image. `choose` returns the engine. Raise ImageError,
        HostError or UsageProblem.
        """
        if spec.network.proxy:
            spec = replace(spec, env={**proxy_variables(), **spec.env})
        image = self._image(spec.image or "", who)
        ready, choice = choose_ready(spec.ready, image.config), choose()
        inputs = SnapshotInputs(
            spec=spec,
            ready=ReadySpec(mode=ReadyMode.AGENT) if spec.depends_on else ready,
            ready_joined=ready,
            image=image.config,
            image_digest=image.digest,
            rootfs_key=image.rootfs.key,
            files=self.guest_files(image.rootfs.file(_ROOTFS)),
            kernel_digest=self.kernel.digest,
            kernel_release=self.kernel.release,
            initramfs_key=self._initramfs.key,
            engine=choice.engine,
            report=choice.report,
            network=spec.network.finalize(choice.engine.networks, choice.engine.name),
        )
        choice.engine.check(inputs.shape)
        return inputs

    def snapshot(self, key: str, inputs: SnapshotInputs, who: str, open_namespace: OpenNamespace) -> Entry:
        """Return the snapshot with this key: found in the store, built here, or built by another process meanwhile."""
        announce = self._speaker(inputs.spec.image or "")
        started = monotonic()

        def make(directory: Path, phase: Progress) -> Mapping[str, Any]:
            def report(text: str) -> None:
                phase(text)
                announce(text)

            return build_snapshot(inputs, directory, report, open_namespace)

        entry, is_new = self._obtain("snapshots", key, make, who, fresh=self._options.rebuild)
        if is_new:
            self.built += 1
            announce(f"snapshot ready after {monotonic() - started:.1f} s")
            for line in free_space_beside(entry, self._store, self._options.cache_limit_mib):
                self._note(line)
        else:
            self.reused += 1
        self._hold(entry)
        return entry

    @cached_property
    def _initramfs(self) -> Entry:
        agent = resolve_agent()
        key = canonical_digest(
            {"agent": content_digest(agent), "kernel": self.kernel.digest, "format": INITRAMFS_FORMAT}
        )

        def make(directory: Path, _phase: Progress) -> Mapping[str, Any]:
            build_initramfs(agent=agent, kernel=self.kernel, dest=directory / _INITRAMFS)
            return {"kernel": self.kernel.release}

        return self._obtain("kernels", key, make, "guest kernel")[0]

    def _unpack_kernel(self) -> Path:
        """Return the ELF kernel, unpacked once per kernel."""

        def make(directory: Path, _phase: Progress) -> Mapping[str, Any]:
            extract_vmlinux(self.kernel.bzimage, directory / _VMLINUX)
            return {"kernel": self.kernel.release}

        key = canonical_digest({"vmlinux of": self.kernel.digest})
        return self._obtain("kernels", key, make, "guest kernel")[0].file(_VMLINUX)

    def _image(self, text: str, who: str) -> _Image:
        if text not in self._images:
            name = canonical_digest({"image": text})
            self._failures.check(f"image-{name}")
            with self._store.collection("images").locked(name, who, self._speaker(text)) as phase:
                self._images[text] = self._failures.once(f"image-{name}", lambda: self._resolve_image(text, phase, who))
                self._hold(self._images[text].rootfs)
        return self._images[text]

    def _resolve_image(self, text: str, phase: Progress, who: str) -> _Image:
        reference = parse_reference(text, base=working_dir())
        progress = self._speaker(text)
        phase("pulling the image")
        asked = self._shared / f"asked-{canonical_digest({'image': text})}"  # by another worker of this run
        pull = PullPolicy(self._options.pull)
        if pull is PullPolicy.ALWAYS and asked.exists():
            pull = PullPolicy.MISSING
        pulled = resolve_image(reference, images_dir=self._store.directory("images"), pull=pull, progress=progress)
        touch_marker(asked)
        key = canonical_digest({"image": pulled.digest, "format": ROOTFS_FORMAT})

        def make(directory: Path, _phase: Progress) -> Mapping[str, Any]:
            build_rootfs(pulled, directory / _ROOTFS, progress=progress)
            return {"image": text, "digest": pulled.digest}

        rootfs, _ = self._obtain("images", key, make, who)
        pulled.discard()
        return _Image(digest=pulled.digest, config=pulled.config, rootfs=rootfs)

    def _obtain(self, kind: str, key: str, make: _Make, who: str, *, fresh: bool = False) -> tuple[Entry, bool]:
        """Return an entry and whether it was built here. `fresh` builds it anew, once in a run.

        `make` gets a directory to fill, and a function that shows its phase to those who wait.
        """
        collection = self._store.collection(kind)
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
            touch_marker(renewed)
            return entry, True

    def _speaker(self, image: str) -> Progress:
        return lambda text: self._announce(f"{image}: {text}")
