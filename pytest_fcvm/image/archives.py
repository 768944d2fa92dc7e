"""Tar files that hold an image: what `docker save`, podman and skopeo write.

Formats: Docker's image specification v1.2, "Combined Image JSON + Filesystem Changeset Format"; OCI's image-layout.md.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

__all__ = ["name_archive", "write_without_links"]

_MOST_MEMBERS = 5000  # a saved image has a few for each layer; a root filesystem need not be read to its end
_LARGEST_JSON = 16 << 20


def name_archive(path: Path) -> str:
    """Return the transport that reads this tar file, `docker-archive` or `oci-archive`; "" when it is no saved image.

    A tar that cannot be read here is no saved image either.
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
                if number > _MOST_MEMBERS:
                    break
    except (OSError, EOFError, ValueError, tarfile.TarError):
        return found
    return found


def _lists_layers(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    file = archive.extractfile(member) if member.isfile() and member.size < _LARGEST_JSON else None
    images = json.loads(file.read()) if file else None
    return isinstance(images, list) and all(isinstance(image, dict) and "Layers" in image for image in images)


def write_without_links(source: Path, dest: Path) -> bool:
    """Write a copy in which every link is a file with the content that it names; return False if there are no links.

    Docker once saved a layer that comes twice as a link to the first one; skopeo takes the link's size for the layer's.
    Raise OSError, and TarError for an archive that is damaged or has a link to nothing.
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
                    raise tarfile.ReadError(f"{member.name} is a link to nothing") from error
                if file is None:
                    continue
                plain = tarfile.TarInfo(member.name)
                plain.size = file.seek(0, 2)
                file.seek(0)
                copy.addfile(plain, file)
    return True
