"""A cache of resolved references, so that a second run needs no registry and no layers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.files import replace_file, stamp_of
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.image.reference import ImageKind, ImageReference

__all__ = ["Record", "Stamp", "find_record", "save_record", "stamp_path"]

_SCHEMA = 2
# The file that changes when a tag in the directory changes
_INDEX_FILE = {ImageKind.OCI: "index.json", ImageKind.DIR: "manifest.json"}

Stamp = str | list[int]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The image of a reference, and the stamp of its source at that time."""

    digest: str
    config: ImageConfig
    stamp: Stamp = ""


def find_record(directory: Path, reference: ImageReference, arch: str) -> Record | None:
    """Return the record of a reference, None if there is none or it cannot be read."""
    try:
        data = json.loads(_path(directory, reference, arch).read_text())
        if (data["schema"], data["name"], data["arch"]) != (_SCHEMA, reference.source, arch):
            return None
        return Record(digest=data["digest"], config=ImageConfig.from_json(data["config"]), stamp=data["stamp"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_record(directory: Path, reference: ImageReference, arch: str, record: Record) -> None:
    """Write the record of a reference. Raise HostError when it cannot be written; no partial file is left."""
    data: dict[str, Any] = {
        "schema": _SCHEMA,
        "name": reference.source,
        "arch": arch,
        "stamp": record.stamp,
        "digest": record.digest,
        "config": record.config.to_json(),
    }
    path = _path(directory, reference, arch)
    try:
        replace_file(path, json.dumps(data, indent=1, sort_keys=True))
    except OSError as error:
        raise HostError(
            f"{path} cannot be written: {error.strerror}", hint="free disk space or name another --fcvm-cache-dir"
        ) from error


def stamp_path(kind: ImageKind, path: Path) -> list[int]:
    """Return the stamp of the file that changes when a local image changes. Raise OSError."""
    return stamp_of(path / _INDEX_FILE[kind] if kind in _INDEX_FILE else path)


def _path(directory: Path, reference: ImageReference, arch: str) -> Path:
    name = hashlib.sha256(f"{arch} {reference.source}".encode("utf-8", "surrogateescape")).hexdigest()
    return directory / f"reference-{name[:32]}.json"
