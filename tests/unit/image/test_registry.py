"""Images from a real registry on the loopback interface."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fakes.images import HandmadeImage, entry, tar_of
from fakes.registry import HTPASSWD, PASSWORD, USER, running_registry

from pytest_fcvm.errors import ImageError
from pytest_fcvm.host import own
from pytest_fcvm.host.process import ToolFailed
from pytest_fcvm.image import skopeo
from pytest_fcvm.image.reference import parse_reference
from pytest_fcvm.image.source import PullPolicy, resolve_image

pytestmark = [
    pytest.mark.skipif(not shutil.which(tool), reason=f"{tool} is not installed")
    for tool in ("skopeo", "docker-registry")
]

ONE, TWO = tar_of(entry("a", b"one")), tar_of(entry("a", b"two"))
HEALTH = {"Test": ["CMD", "true"]}


class Registry:
    """A running registry, and a way to push images to it."""

    def __init__(self, address, directory):
        self.address, self.directory, self._count = address, directory, 0

    def push(self, name, *layers, login="", platforms=()):
        """Push an image, with an index over `platforms` if there are any. Return its reference."""
        self._count += 1
        layout = self.directory / f"push{self._count}"
        image = HandmadeImage(layers=layers, config={"Cmd": ["run"], "Healthcheck": HEALTH}, oci=bool(platforms))
        if platforms:
            source = f"oci:{image.write_oci(layout, platforms=platforms)}:latest"
        else:
            source = f"dir:{image.write_dir(layout)}"
        command = ["skopeo", "copy", "--quiet", "--all", "--dest-tls-verify=false"]
        command += ["--dest-creds", login] if login else []
        subprocess.run([*command, source, f"docker://{self.address}/{name}"], check=True, capture_output=True)
        return f"{self.address}/{name}"


@pytest.fixture
def registry(tmp_path):
    with running_registry(tmp_path / "registry") as address:
        yield Registry(address, tmp_path)


@pytest.fixture
def resolve(tmp_path):
    """Resolve a reference. `said` has the progress of the last call."""
    (tmp_path / "images").mkdir()

    def resolve_one(text, pull="missing"):
        resolve_one.said = []
        return resolve_image(
            parse_reference(text, base=tmp_path),
            images_dir=tmp_path / "images",
            pull=PullPolicy(pull),
            progress=resolve_one.said.append,
        )

    return resolve_one


def content(image):
    """Return the bytes of the layers, and discard the layers."""
    found = [gzip.decompress(layer.path.read_bytes()) for layer in image.layers]
    image.discard()
    return found


def test_an_image_is_pulled_with_its_healthcheck(registry, resolve):
    image = resolve(registry.push("library/thing:1", ONE, TWO))
    assert image.config.cmd == ("run",)
    assert image.config.healthcheck is not None
    assert content(image) == [ONE, TWO]


def test_a_known_image_needs_no_registry_until_its_layers_are_used(tmp_path, resolve):
    with running_registry(tmp_path / "registry") as address:
        reference = Registry(address, tmp_path).push("thing:1", ONE)
        digest = resolve(reference).digest
    for policy in ("missing", "never"):
        image = resolve(reference, policy)
        assert image.digest == digest
        assert resolve.said == []
    image.discard()
    with pytest.raises(ImageError, match="connection refused"):
        _ = image.layers
    assert all(path.is_file() for path in (tmp_path / "images").iterdir())


def test_a_tag_that_moved_is_followed_only_by_always(registry, resolve):
    reference = registry.push("thing:1", ONE)
    old = resolve(reference)
    old.discard()
    registry.push("thing:1", TWO)
    assert resolve(reference).digest == old.digest
    new = resolve(reference, "always")
    assert new.digest != old.digest
    assert content(new) == [TWO]
    assert resolve(reference).digest == new.digest


def test_always_pulls_nothing_when_the_tag_has_not_moved(registry, resolve):
    reference = registry.push("thing:1", ONE)
    resolve(reference).discard()
    resolve(reference, "always")
    assert len(resolve.said) == 1
    assert resolve.said[0].startswith("asking ")


def test_the_layers_of_a_known_image_are_its_own_after_the_tag_has_moved(registry, resolve):
    reference = registry.push("thing:1", ONE)
    resolve(reference).discard()
    registry.push("thing:1", TWO)
    assert content(resolve(reference)) == [ONE]


def test_an_index_gives_this_hosts_platform_and_is_found_again(registry, resolve):
    arm = HandmadeImage(layers=[TWO], architecture="arm64", oci=True)
    reference = registry.push("multi:1", ONE, platforms=[arm])
    image = resolve(reference)
    assert image.config.architecture == "amd64"
    assert content(image) == [ONE]
    assert resolve(reference, "always").digest == image.digest
    assert [text.split()[0] for text in resolve.said] == ["asking"]
    assert content(resolve(reference)) == [ONE]


def test_a_digest_always_names_the_same_image(registry, resolve):
    reference = registry.push("thing:1", ONE)
    digest = resolve(reference).digest
    registry.push("thing:1", TWO)
    pinned = f"{reference.rpartition(':')[0]}@{digest}"
    assert content(resolve(pinned)) == [ONE]
    assert resolve(pinned, "always").digest == digest
    assert resolve.said == []


@pytest.mark.parametrize("name", ["nothing:1", "thing:2"])
def test_a_missing_image_is_an_error_with_the_registrys_reason(tmp_path, registry, resolve, name):
    registry.push("thing:1", ONE)
    with pytest.raises(ImageError) as caught:
        resolve(f"{registry.address}/{name}")
    assert "manifest unknown" in caught.value.message
    assert "\n" not in caught.value.message
    assert "skopeo list-tags" in caught.value.hint
    assert list((tmp_path / "images").iterdir()) == []


def _run_command_of(hint, *more):
    """Run the command in a hint as it is printed."""
    command = re.search(r"skopeo [a-z-]+(?: --\S+)* \S+", hint)[0].split()
    return subprocess.run([*command, *more], capture_output=True, text=True, timeout=60, check=False)


def test_the_command_that_lists_tags_runs_as_it_is_printed(registry, resolve):
    registry.push("team/thing:1", ONE)
    for wrong in ("team/thing:2", f"team/thing@sha256:{'0' * 64}"):
        with pytest.raises(ImageError) as caught:
            resolve(f"{registry.address}/{wrong}")
        listed = _run_command_of(caught.value.hint)
        assert listed.returncode == 0, listed.stderr
        assert json.loads(listed.stdout)["Tags"] == ["1"]


def test_the_command_that_shows_more_runs_as_it_is_printed(registry, tmp_path):
    reference = parse_reference(registry.push("thing:1", ONE), base=tmp_path)
    error = skopeo.image_error(ToolFailed("skopeo failed: without a reason"), reference, "amd64")
    shown = _run_command_of(error.hint)
    assert shown.returncode == 0, shown.stderr


def test_the_command_that_logs_in_runs_as_it_is_printed(closed, resolve, tmp_path, monkeypatch):
    reference = closed.push("thing:1", ONE, login=f"{USER}:{PASSWORD}")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    with pytest.raises(ImageError) as caught:
        resolve(reference)
    logged_in = _run_command_of(caught.value.hint, "--username", USER, "--password", PASSWORD)
    assert logged_in.returncode == 0, logged_in.stderr
    assert content(resolve(reference)) == [ONE]


def test_with_never_the_hint_says_how_to_get_an_unknown_image(registry, resolve):
    reference = registry.push("thing:1", ONE)
    with pytest.raises(ImageError) as caught:
        resolve(reference, "never")
    assert "--fcvm-pull missing" in caught.value.hint
    assert resolve.said == []


def test_an_unreachable_registry_is_reported(resolve):
    with pytest.raises(ImageError, match="connection refused") as caught:
        resolve("127.0.0.1:1/thing:1")
    assert "127.0.0.1:1 cannot be reached" in caught.value.hint


def test_a_host_name_that_does_not_resolve_is_reported(resolve):
    with pytest.raises(ImageError) as caught:
        resolve("registry.invalid/thing:1")
    assert "registry.invalid cannot be reached" in caught.value.hint


@pytest.fixture
def closed(tmp_path):
    """A registry that requires a password."""
    with running_registry(tmp_path / "registry", htpasswd=HTPASSWD) as address:
        yield Registry(address, tmp_path)


def test_a_registry_that_requires_a_password_has_a_hint_with_skopeo_login(closed, resolve):
    with pytest.raises(ImageError) as caught:
        resolve(closed.push("thing:1", ONE, login=f"{USER}:{PASSWORD}"))
    assert f"skopeo login --tls-verify=false {closed.address}" in caught.value.hint


@pytest.mark.parametrize(("password", "works"), [(PASSWORD, True), ("not-the-password", False)])
def test_skopeos_own_auth_file_is_used_and_never_shown(tmp_path, closed, resolve, monkeypatch, password, works):
    reference = closed.push("thing:1", ONE, login=f"{USER}:{PASSWORD}")
    secret = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (tmp_path / "auth.json").write_text(json.dumps({"auths": {closed.address: {"auth": secret}}}))
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    if works:
        assert content(resolve(reference)) == [ONE]
        return
    with pytest.raises(ImageError) as caught:
        resolve(reference)
    shown = f"{caught.value} {caught.value.evidence}"
    assert password not in shown
    assert secret not in shown
    assert "skopeo login" in caught.value.hint


def test_a_damaged_blob_in_the_registry_is_an_error_and_leaves_nothing(tmp_path, registry, resolve):
    reference = registry.push("thing:1", ONE)
    blobs = [
        path
        for path in (tmp_path / "registry").rglob("data")
        if path.is_file() and path.read_bytes()[:2] == b"\x1f\x8b"
    ]
    assert blobs
    for path in blobs:
        path.write_bytes(path.read_bytes()[:-5] + b"wrong")
    with pytest.raises(ImageError):
        resolve(reference)
    assert list((tmp_path / "images").iterdir()) == []


def test_a_login_directory_that_only_root_may_open_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert skopeo.skopeo_environment(tmp_path / "gone") is None
    assert skopeo.skopeo_environment(tmp_path) is None
    access = os.access
    monkeypatch.setattr(own.os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    changed = skopeo.skopeo_environment(tmp_path)
    assert changed is not None
    assert Path(changed["XDG_RUNTIME_DIR"]).stat().st_uid == os.getuid()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1")
    assert skopeo.skopeo_environment(tmp_path) is None
