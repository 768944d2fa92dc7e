"""An image in skopeo's `dir:` layout: `manifest.json`, and blobs named by the hex of their digests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_fcvm.errors import ImageError
from pytest_fcvm.image.blobs import LayerBlob
from pytest_fcvm.image.config import ImageConfig

__all__ = ["ImageDirectory", "digest_of", "listed_digests", "read_image_directory"]

_DIGEST = re.compile(r"(sha256|sha384|sha512):[0-9a-f]{64,128}")
_MAX_JSON_BYTES = 16 << 20
_ARCH_NAMES = {"amd64": ("amd64", "x86_64"), "arm64": ("arm64", "aarch64")}


@dataclass(frozen=True, kw_only=True)
class ImageDirectory:
    """The content of a `dir:` layout. `digest` is the manifest's; the lowest layer comes first."""

    digest: str
    config: ImageConfig
    layers: tuple[LayerBlob, ...]


def digest_of(data: bytes) -> str:
    """Return the digest of bytes as "sha256:HEX"."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def read_image_directory(directory: Path, *, arch: str) -> ImageDirectory:
    """Read manifest and configuration. Raise ImageError if they are broken, too old or of another platform."""
    raw = _read(directory / "manifest.json")
    manifest = _document(raw, "manifest")
    if "config" not in manifest or "layers" not in manifest:
        raise ImageError(
            f"the image's manifest has an unsupported type: {str(manifest.get('mediaType', ''))[:80]!r}",
            hint="push the image again with a tool that writes OCI or Docker schema 2 manifests",
        )
    try:
        config = _read(directory / _blob_name(manifest["config"]["digest"]))
        if digest_of(config) != manifest["config"]["digest"]:
            raise _broken("its configuration does not have the digest in the manifest")
        document = _document(config, "configuration")
        layers = _layers(directory, manifest["layers"], document)
    except (KeyError, TypeError, AttributeError) as error:
        raise _broken(f"its manifest lacks a field ({error})") from error
    _check_platform(document, arch)
    return ImageDirectory(digest=digest_of(raw), config=ImageConfig.from_image(document), layers=layers)


def listed_digests(raw: bytes) -> frozenset[str]:
    """Return the digests of the manifests in an index, none for a manifest."""
    entries = _document(raw, "manifest").get("manifests")
    return frozenset(str(entry.get("digest")) for entry in entries or () if isinstance(entry, dict))


def _layers(directory: Path, entries: list[Mapping[str, Any]], document: Mapping[str, Any]) -> tuple[LayerBlob, ...]:
    diff_ids = document.get("rootfs", {}).get("diff_ids") or []
    if diff_ids and len(diff_ids) != len(entries):
        raise _broken(f"it has {len(entries)} layers but {len(diff_ids)} diff_ids")
    blobs = []
    for number, entry in enumerate(entries):
        if "encrypted" in str(entry.get("mediaType", "")):
            raise ImageError("a layer of the image is encrypted", hint="name an image without encrypted layers")
        diff_id = diff_ids[number] if diff_ids else ""
        _blob_name(diff_id or entry["digest"])
        blobs.append(LayerBlob(path=directory / _blob_name(entry["digest"]), digest=entry["digest"], diff_id=diff_id))
    return tuple(blobs)


def _check_platform(document: Mapping[str, Any], arch: str) -> None:
    system, architecture = document.get("os") or "linux", document.get("architecture") or arch
    if system != "linux" or architecture not in _ARCH_NAMES.get(arch, (arch,)):
        raise ImageError(
            f"the image is for {str(system)[:20]}/{str(architecture)[:20]}, guests on this host are linux/{arch}",
            hint=f"name an image with a variant for linux/{arch}",
        )


def _blob_name(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise _broken(f"{digest[:80]!r} is not a digest")
    return digest.partition(":")[2]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise _broken(f"{path.name} cannot be read ({error.strerror})") from error
    if len(data) > _MAX_JSON_BYTES:
        raise _broken(f"{path.name} is too large")
    return data


def _document(data: bytes, what: str) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _broken(f"its {what} is not JSON") from error
    if not isinstance(value, dict):
        raise _broken(f"its {what} is not a JSON object")
    return value


def _broken(what: str) -> ImageError:
    return ImageError(f"the image is broken: {what}", hint="pull the image again (--fcvm-pull always) or rebuild it")
