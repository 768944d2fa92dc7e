"""Make images for tests: tar layers of any shape, and `dir:` and `oci:` layouts; list the files in a squashfs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


def entry(name: str, content: bytes = b"", **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return a regular file, or another member by `type`, with TarInfo's attributes."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def directory(name: str, mode: int = 0o755, **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return a directory."""
    return entry(name, type=tarfile.DIRTYPE, mode=mode, **attributes)


def symlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    """Return a symbolic link."""
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


def hardlink(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    """Return a hard link."""
    return entry(name, type=tarfile.LNKTYPE, linkname=target)


def tar_of(*entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    """Return a tar file of the entries, in their order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def compressed(data: bytes, how: str) -> bytes:
    """Return data as `plain`, `gzip` or `zstd`."""
    if how == "gzip":
        return gzip.compress(data, compresslevel=1, mtime=0)
    if how == "zstd":
        return subprocess.run(["zstd", "-cq"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def sha256(data: bytes) -> str:
    """Return a digest as images write it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(kw_only=True)
class HandmadeImage:
    """An image that can be written in a layout. `config` is the `config` section of its configuration."""

    layers: Iterable[bytes] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = "amd64"
    system: str = "linux"
    compression: str = "gzip"
    oci: bool = False

    def write_dir(self, directory: Path) -> Path:
        """Write skopeo's `dir:` layout and return its directory."""
        directory.mkdir(parents=True)
        (directory / "version").write_text("Directory Transport Version: 1.1\n")
        (directory / "manifest.json").write_bytes(self._manifest(directory))
        return directory

    def write_oci(self, directory: Path, tag: str = "latest", *, platforms: Iterable[HandmadeImage] = ()) -> Path:
        """Write an OCI layout with one manifest, or with an index over `platforms`, and return its directory."""
        blobs = directory / "blobs" / "sha256"
        blobs.mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        images = [self, *platforms]
        found = [image.describe(blobs) for image in images]
        top = found[0]
        if len(images) > 1:
            index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found}).encode()
            top = {"mediaType": OCI_INDEX, **_store(blobs, index)}
        named = {**top, "annotations": {"org.opencontainers.image.ref.name": tag}}
        (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [named]}))
        return directory

    def describe(self, blobs: Path) -> dict[str, Any]:
        platform = {"architecture": self.architecture, "os": self.system}
        return {"mediaType": OCI_MANIFEST, "platform": platform, **_store(blobs, self._manifest(blobs))}

    def _manifest(self, blobs: Path) -> bytes:
        layers = list(self.layers)
        document = {
            "architecture": self.architecture,
            "os": self.system,
            "config": dict(self.config),
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        }
        kind = "application/vnd.oci.image" if self.oci else "application/vnd.docker"
        suffix = {"plain": "", "gzip": "gzip", "zstd": "zstd"}[self.compression]
        layer_type = f"{kind}.layer.v1.tar" if self.oci else f"{kind}.image.rootfs.diff.tar"
        separator = "+" if self.oci else "."
        config_type = f"{kind}.config.v1+json" if self.oci else f"{kind}.container.image.v1+json"
        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST if self.oci else DOCKER_MANIFEST,
            "config": {"mediaType": config_type, **_store(blobs, json.dumps(document).encode())},
            "layers": [
                {
                    "mediaType": f"{layer_type}{separator}{suffix}" if suffix else layer_type,
                    **_store(blobs, compressed(layer, self.compression)),
                }
                for layer in layers
            ],
        }
        return json.dumps(manifest).encode()


def _store(blobs: Path, data: bytes) -> dict[str, Any]:
    digest = sha256(data)
    (blobs / digest.partition(":")[2]).write_bytes(data)
    return {"digest": digest, "size": len(data)}
