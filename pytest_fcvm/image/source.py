"""Resolve a reference to an image: digest and configuration at once, layers on first use."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path

from pytest_fcvm.errors import HostError, ImageError
from pytest_fcvm.host.own import getpid, shutil
from pytest_fcvm.image.archives import find_transport
from pytest_fcvm.image.blobs import LayerBlob
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.image.contents import read_directory
from pytest_fcvm.image.manifest import digest_of, listed_digests, read_image_directory
from pytest_fcvm.image.pull_cache import Record, Stamp, find_record, save_record, stamp_path
from pytest_fcvm.image.reference import ImageKind, ImageReference
from pytest_fcvm.image.skopeo import ask_docker, ask_manifest, copy_image
from pytest_fcvm.model.results import Progress
from pytest_fcvm.store import canonical_digest

__all__ = ["PullPolicy", "PulledImage", "resolve_image"]


class PullPolicy(StrEnum):
    """When to ask the registry: for unknown images, in every run, or never."""

    MISSING = "missing"
    ALWAYS = "always"
    NEVER = "never"


class PulledImage:
    """An image whose digest and configuration are known. The first use of `layers` fetches them.

    The layers are in `directory`; `discard` removes it. The caller holds the lock of the key
    `canonical_digest({"image": reference.text})` in `images_dir`: it keeps the janitor from removing the directory.
    """

    def __init__(self, reference: ImageReference, images_dir: Path, arch: str, progress: Progress) -> None:
        self.reference, self.arch = reference, arch
        self.directory = images_dir / f"{canonical_digest({'image': reference.text})}.tmp-{getpid()}"
        self.digest, self.config = "", ImageConfig(architecture=arch)
        self._progress = progress
        self._layers: tuple[LayerBlob, ...] | None = None

    @property
    def layers(self) -> tuple[LayerBlob, ...]:
        """Return the layers, lowest first; none for a directory. Raise ImageError if they are unavailable."""
        if self._layers is None:
            pinned = self.reference.at_digest(self.digest)
            if self._copy(pinned) != self.digest:
                raise ImageError(
                    f"image {self.reference.text} changed while it was read",
                    hint="run again, or use --fcvm-pull always",
                )
        assert self._layers is not None
        return self._layers

    def pull(self) -> None:
        """Fetch the current image of the reference, and set digest and configuration."""
        self.digest = ""
        self.digest = self._copy(self.reference)

    def _make_directory(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            self.directory.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise HostError(
                f"{self.directory.parent} cannot be written: {error.strerror}", hint="name another --fcvm-cache-dir"
            ) from error

    def discard(self) -> None:
        """Remove the layers. Digest and configuration stay; the next use of `layers` fetches them again."""
        self._layers = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def use_record(self, record: Record) -> None:
        """Set digest and configuration from a record."""
        self.digest, self.config = record.digest, record.config

    def _copy(self, reference: ImageReference) -> str:
        if reference.kind.is_rootfs:
            return self._read_rootfs()
        self._make_directory()
        try:
            self._progress(f"pulling {reference.text}")
            copy_image(reference, self.directory / "image", arch=self.arch)
            found = read_image_directory(self.directory / "image", arch=self.arch)
        except BaseException:
            self.discard()
            raise
        self.config, self._layers = found.config, found.layers
        return found.digest

    def _read_rootfs(self) -> str:
        path = self.reference.path
        assert path is not None
        if self.reference.kind is ImageKind.ROOTFS_DIR:
            self._layers = ()
            return _directory_digest(path)
        if transport := find_transport(path):
            raise ImageError(
                f"{path} is an image, not a tar of a root filesystem", hint=f"write {transport}:{self.reference.text}"
            )
        digest = _file_digest(path) if not self.digest else self.digest
        self._layers = (LayerBlob(path=path, digest=digest),)
        return digest


def resolve_image(
    reference: ImageReference, *, images_dir: Path, pull: PullPolicy, progress: Progress, arch: str = "amd64"
) -> PulledImage:
    """Return the image of a reference, from the record of an earlier run if the policy and the image's files allow it.

    Check a local image for changes every time, whatever the policy. Raise ImageError if the image is unavailable or not
    for `arch`, HostError without skopeo or disk space. The caller holds a lock on the reference.
    """
    image = PulledImage(reference, images_dir, arch, progress)
    stamp = _take_stamp(reference)
    record = find_record(images_dir, reference, arch)
    if record is not None and record.stamp == stamp and stamp is not None:
        if pull is not PullPolicy.ALWAYS or not _has_moved(reference, record, progress):
            image.use_record(record)
            return image
    elif reference.kind.is_remote and pull is PullPolicy.NEVER:
        raise ImageError(
            f"image {reference.text} is not in the cache, and --fcvm-pull is never",
            hint="run once with --fcvm-pull missing",
        )
    image.pull()
    if stamp is not None:
        save_record(images_dir, reference, arch, Record(digest=image.digest, config=image.config, stamp=stamp))
    return image


def _take_stamp(reference: ImageReference) -> Stamp | None:
    """Return a stamp that changes when a local image changes, "" for a registry's, None if there is no stamp."""
    try:
        if reference.kind is ImageKind.ROOTFS_DIR:
            return None
        if reference.path is not None:
            return stamp_path(reference.kind, reference.path)
    except OSError as error:
        raise ImageError(
            f"image {reference.text} cannot be read: {error.filename}: {error.strerror}", hint="check the path"
        ) from error
    if reference.kind is ImageKind.CONTAINERS_STORAGE:
        return digest_of(ask_manifest(reference))
    if reference.kind is ImageKind.DOCKER_DAEMON:
        return ask_docker(reference)
    return ""


def _has_moved(reference: ImageReference, record: Record, progress: Progress) -> bool:
    """Ask the registry whether the reference names another image than the record."""
    if not reference.kind.is_remote or reference.pinned_digest:
        return False
    progress(f"asking {reference.registry} for {reference.text}")
    manifest = ask_manifest(reference)
    return digest_of(manifest) != record.digest and record.digest not in listed_digests(manifest)


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise ImageError(
            f"{path} cannot be read: {error.strerror}", hint="check the path and its permissions"
        ) from error


def _directory_digest(path: Path) -> str:
    """Return a digest over names and attributes, with inode and ctime. It shows changes without reading contents."""
    digest = hashlib.sha256()
    tree, contents = read_directory(path)
    for name, node in tree.walk():
        digest.update(f"{name}\0{node.kind}\0{node.mode:o} {node.uid} {node.gid} {node.size} {node.device}".encode())
        digest.update(f"\0{node.target}\0{contents.stamp(node)}\0".encode("utf-8", "surrogateescape"))
    return f"sha256:{digest.hexdigest()}"
