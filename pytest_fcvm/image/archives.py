"""Tar files with an image, as `docker save`, podman and skopeo write them.

Formats: Docker's image specification v1.2, "Combined Image JSON + Filesystem Changeset Format"; OCI's image-layout.md.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

__all__ = ["find_transport", "write_without_links"]

_MAX_MEMBERS = 5000  # a saved image has a few members per layer; this stops early in a root filesystem
_MAX_JSON_BYTES = 16 << 20


def find_transport(path: Path) -> str:
    """Return the transport of a saved image, `docker-archive` or `oci-archive`, or "" for any other tar file.

    Return "" for an unreadable file too.
    """
    found = ""
    try:
        with tarfile.open(path, errors="surrogateescape") as archive:
            for number, member in enumerate(archive):
                name = member.name.removeprefix("./")
                if name == "manifest.json" and _lists_layers(archive, member):
                    return "docker-archive"
                if name == "oci-layout" and member.isfile():
                    found = "oci-archive"
                if number > _MAX_MEMBERS:
                    break
    except (OSError, EOFError, ValueError, tarfile.TarError):
        return found
    return found


def _lists_layers(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    file = archive.extractfile(member) if member.isfile() and member.size < _MAX_JSON_BYTES else None
    images = json.loads(file.read()) if file else None
    return isinstance(images, list) and all(isinstance(image, dict) and "Layers" in image for image in images)


def write_without_links(source: Path, dest: Path) -> bool:
    """Write a copy in which every link is a file with the content of its target. Return False if there are no links.

    Old versions of Docker save a repeated layer as a link to the first one; skopeo then takes the link's size for the
    layer's. Raise OSError, and TarError for a damaged archive or a link without a target.
    """
    with tarfile.open(source, errors="surrogateescape") as archive:
        if not any(member.issym() or member.islnk() for member in archive):
            return False
        with tarfile.open(dest, "w", errors="surrogateescape") as copy:
            for member in archive:
                if member.isdir():
                    continue
                try:
                    file = archive.extractfile(member)
                except KeyError as error:
                    raise tarfile.ReadError(f"{member.name} is a link without a target") from error
                if file is None:
                    continue
                plain = tarfile.TarInfo(member.name)
                plain.size = file.seek(0, 2)
                file.seek(0)
                copy.addfile(plain, file)
    return True
