"""What is known of a reference from last time, so that a second run needs neither registry nor layers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.image.reference import ImageKind, ImageReference

__all__ = ["Record", "find_record", "save_record", "take_stamps"]

_SCHEMA = 1
# Where podman and skopeo keep their list of images; both write it anew whenever an image comes, goes or is renamed.
_STORAGE_LISTS = ("/var/lib/containers/storage", "~/.local/share/containers/storage")

Stamps = Mapping[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a reference meant. `asked` is the digest of what the registry answered: an index's, or the manifest's."""

    digest: str
    config: ImageConfig
    asked: str = ""


def find_record(folder: Path, reference: ImageReference, arch: str) -> Record | None:
    """Return what is known of a reference, None when that is nothing or when its file has changed since."""
    try:
        data = json.loads(_path(folder, reference, arch).read_text())
        if (data["schema"], data["name"], data["arch"]) != (_SCHEMA, _identity(reference), arch):
            return None
        if data["stamps"] != take_stamps(reference):
            return None
        return Record(digest=data["digest"], config=ImageConfig.from_json(data["config"]), asked=data["asked"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_record(folder: Path, reference: ImageReference, arch: str, record: Record, stamps: Stamps) -> None:
    """Remember a reference. `stamps` are those from before the image was read."""
    data: dict[str, Any] = {
        "schema": _SCHEMA,
        "name": _identity(reference),
        "arch": arch,
        "stamps": stamps,
        "digest": record.digest,
        "asked": record.asked,
        "config": record.config.to_json(),
    }
    path = _path(folder, reference, arch)
    fresh = path.with_name(f"{path.stem}.tmp-{os.getpid()}")
    try:
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(data, indent=1, sort_keys=True))
        fresh.replace(path)
    except BaseException:
        with suppress(OSError):
            fresh.unlink()
        raise


def take_stamps(reference: ImageReference) -> Stamps:
    """Return (dev, inode, size, mtime, ctime) of the files that change when a local image does; none for a registry's.

    Raise OSError when the image's own path is not there.
    """
    if reference.path is not None:
        return _stamp_all(_files(reference.kind, reference.path))
    if reference.kind is ImageKind.CONTAINERS_STORAGE:
        lists = (Path(root).expanduser() / "overlay-images/images.json" for root in _STORAGE_LISTS)
        return _stamp_all([path for path in lists if path.exists()])
    return {}


def _files(kind: ImageKind, path: Path) -> list[Path]:
    if kind is ImageKind.OCI:
        return [path / "index.json"]
    if kind is ImageKind.DIR:
        return [path / "manifest.json"]
    return [path]


def _stamp_all(paths: list[Path]) -> Stamps:
    stamps = {}
    for path in paths:
        status = path.stat()
        stamps[str(path)] = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return stamps


def _identity(reference: ImageReference) -> str:
    return reference.skopeo or f"{reference.kind}:{reference.path}"


def _path(folder: Path, reference: ImageReference, arch: str) -> Path:
    name = hashlib.sha256(f"{arch} {_identity(reference)}".encode("utf-8", "surrogateescape")).hexdigest()
    return folder / f"reference-{name[:32]}.json"
