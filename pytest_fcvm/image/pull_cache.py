"""What is known of a reference from last time, so that a second run needs neither registry nor layers."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.own import getpid
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.image.reference import ImageKind, ImageReference

__all__ = ["Record", "Stamp", "find_record", "save_record", "stamp_path"]

_SCHEMA = 2
# The file that changes whenever what the directory holds under its tags does
_ENTRANCE = {ImageKind.OCI: "index.json", ImageKind.DIR: "manifest.json"}

Stamp = str | list[int]


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a reference meant, and the stamp its source had then."""

    digest: str
    config: ImageConfig
    stamp: Stamp = ""


def find_record(directory: Path, reference: ImageReference, arch: str) -> Record | None:
    """Return what is known of a reference, None when that is nothing or cannot be read."""
    try:
        data = json.loads(_path(directory, reference, arch).read_text())
        if (data["schema"], data["name"], data["arch"]) != (_SCHEMA, reference.source, arch):
            return None
        return Record(digest=data["digest"], config=ImageConfig.from_json(data["config"]), stamp=data["stamp"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_record(directory: Path, reference: ImageReference, arch: str, record: Record) -> None:
    """Remember a reference. Raise HostError when it cannot be written; nothing is left of it then."""
    data: dict[str, Any] = {
        "schema": _SCHEMA,
        "name": reference.source,
        "arch": arch,
        "stamp": record.stamp,
        "digest": record.digest,
        "config": record.config.to_json(),
    }
    path = _path(directory, reference, arch)
    fresh = path.with_name(f"{path.stem}.tmp-{getpid()}")
    try:
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(data, indent=1, sort_keys=True))
        fresh.replace(path)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink()
        raise HostError(
            f"{path} cannot be written: {error.strerror}", hint="free some disk or name another --fcvm-cache-dir"
        ) from error


def stamp_path(kind: ImageKind, path: Path) -> list[int]:
    """Return (dev, inode, size, mtime, ctime) of the file that changes when a local image does. Raise OSError."""
    status = (path / _ENTRANCE[kind] if kind in _ENTRANCE else path).stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _path(directory: Path, reference: ImageReference, arch: str) -> Path:
    name = hashlib.sha256(f"{arch} {reference.source}".encode("utf-8", "surrogateescape")).hexdigest()
    return directory / f"reference-{name[:32]}.json"
