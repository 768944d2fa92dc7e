"""Image directories as skopeo's `dir:` writes them, without skopeo's own checks."""

from __future__ import annotations

import json

import pytest
from fakes.images import HandmadeImage, entry, sha256, tar_of

from pytest_fcvm.errors import ImageError
from pytest_fcvm.image.manifest import listed_digests, read_image_directory

LAYERS = [tar_of(entry("a")), tar_of(entry("b"))]


@pytest.fixture
def directory(tmp_path):
    return HandmadeImage(layers=LAYERS).write_dir(tmp_path / "d")


def change_manifest(directory, change):
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def change_config(directory, change):
    """Change the configuration and update its digest."""
    manifest = json.loads((directory / "manifest.json").read_text())
    document = json.loads((directory / manifest["config"]["digest"][7:]).read_text())
    change(document)
    data = json.dumps(document).encode()
    (directory / sha256(data)[7:]).write_bytes(data)
    change_manifest(directory, lambda manifest: manifest["config"].update(digest=sha256(data)))


def test_layers_come_lowest_first_with_both_digests(directory):
    found = read_image_directory(directory, arch="amd64")
    assert [layer.diff_id for layer in found.layers] == [sha256(layer) for layer in LAYERS]
    assert [layer.digest for layer in found.layers] == [sha256(layer.path.read_bytes()) for layer in found.layers]
    assert found.digest == sha256((directory / "manifest.json").read_bytes())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda manifest: manifest.pop("layers"), "has an unsupported type"),
        (lambda manifest: manifest.update(config={}), "lacks a field"),
        (lambda manifest: manifest.update(config=5), "lacks a field"),
        (lambda manifest: manifest.update(layers=5), "lacks a field"),
        (lambda manifest: manifest.update(layers=[5, 6]), "lacks a field"),
        (lambda manifest: manifest["layers"].pop(), "1 layers but 2 diff_ids"),
        (lambda manifest: manifest["layers"][0].update(digest="sha256:../../../etc/passwd"), "is not a digest"),
        (lambda manifest: manifest["layers"][0].update(digest=5), "lacks a field"),
        (lambda manifest: manifest["layers"][0].update(mediaType="x.tar+gzip+encrypted"), "is encrypted"),
        (lambda manifest: manifest["config"].update(digest="sha256:" + "0" * 64), "cannot be read"),
    ],
)
def test_an_invalid_manifest_is_refused(directory, change, match):
    change_manifest(directory, change)
    with pytest.raises(ImageError, match=match):
        read_image_directory(directory, arch="amd64")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda document: document.update(architecture="arm64"), "linux/arm64"),
        (lambda document: document.update(os="windows"), "windows/amd64"),
        (lambda document: document["rootfs"].update(diff_ids=["sha256:x", "sha256:y"]), "is not a digest"),
        (lambda document: document.update(rootfs=5), "lacks a field"),
        (lambda document: document.update(config=5), "malformed"),
    ],
)
def test_an_invalid_configuration_is_refused(directory, change, match):
    change_config(directory, change)
    with pytest.raises(ImageError, match=match):
        read_image_directory(directory, arch="amd64")


def test_a_configuration_with_another_digest_is_refused(directory):
    name = json.loads((directory / "manifest.json").read_text())["config"]["digest"][7:]
    (directory / name).write_bytes((directory / name).read_bytes() + b" ")
    with pytest.raises(ImageError, match="does not have the digest in the manifest"):
        read_image_directory(directory, arch="amd64")


def test_a_configuration_without_diff_ids_or_platform_is_accepted(directory):
    change_config(directory, lambda document: [document.pop(name) for name in ("rootfs", "os", "architecture")])
    assert [layer.diff_id for layer in read_image_directory(directory, arch="amd64").layers] == ["", ""]


def test_the_digests_of_an_index_are_listed():
    index = {"manifests": [{"digest": "sha256:1"}, {"digest": "sha256:2"}, 5]}
    assert listed_digests(json.dumps(index).encode()) == {"sha256:1", "sha256:2"}
    assert listed_digests(b'{"layers": []}') == frozenset()
