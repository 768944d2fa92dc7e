"""The spellings of image references."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.image.reference import ImageKind, parse_reference

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "skopeo", "local"),
    [
        ("nginx", "docker://docker.io/library/nginx:latest", False),
        ("nginx:1.25", "docker://docker.io/library/nginx:1.25", False),
        ("docker://nginx:1.25", "docker://docker.io/library/nginx:1.25", False),
        ("bitnami/redis", "docker://docker.io/bitnami/redis:latest", False),
        ("docker.io/nginx", "docker://docker.io/library/nginx:latest", False),
        ("index.docker.io/a/b:c", "docker://docker.io/a/b:c", False),
        ("quay.io/a/b/c:v1", "docker://quay.io/a/b/c:v1", False),
        ("localhost/x:1", "docker://localhost/x:1", True),
        ("localhost:5000/x:1", "docker://localhost:5000/x:1", True),
        ("127.0.0.1:5000/x", "docker://127.0.0.1:5000/x:latest", True),
        ("127.8.9.1/x", "docker://127.8.9.1/x:latest", True),
        ("[::1]:5000/x", "docker://[::1]:5000/x:latest", True),
        ("[fd00::1]:5000/x", "docker://[fd00::1]:5000/x:latest", False),
        ("10.0.0.1:5000/x", "docker://10.0.0.1:5000/x:latest", False),
        ("127.0.0.1.evil.example/x", "docker://127.0.0.1.evil.example/x:latest", False),
        ("localhost.example/x", "docker://localhost.example/x:latest", False),
        (f"nginx@{DIGEST}", f"docker://docker.io/library/nginx@{DIGEST}", False),
        (f"nginx:1.25@{DIGEST}", f"docker://docker.io/library/nginx@{DIGEST}", False),
        (f"localhost:5000/x@{DIGEST}", f"docker://localhost:5000/x@{DIGEST}", True),
    ],
)
def test_a_registrys_image_is_read_as_in_docker(tmp_path, text, skopeo, local):
    reference = parse_reference(text, base=tmp_path)
    assert (reference.text, reference.kind, reference.skopeo) == (text, ImageKind.DOCKER, skopeo)
    assert reference.is_local_registry is local


@pytest.mark.parametrize(
    ("text", "kind", "skopeo"),
    [
        ("oci:layout", ImageKind.OCI, "oci:{}/layout"),
        ("oci:layout:v1", ImageKind.OCI, "oci:{}/layout:v1"),
        ("oci-archive:a/b.tar:v1", ImageKind.OCI_ARCHIVE, "oci-archive:{}/a/b.tar:v1"),
        ("docker-archive:b.tar:x/y:1", ImageKind.DOCKER_ARCHIVE, "docker-archive:{}/b.tar:x/y:1"),
        ("docker-archive:/abs.tar", ImageKind.DOCKER_ARCHIVE, "docker-archive:/abs.tar"),
        ("dir:some:where", ImageKind.DIR, "dir:{}/some:where"),
        ("containers-storage:localhost/x:1", ImageKind.CONTAINERS_STORAGE, "containers-storage:localhost/x:1"),
        (
            "containers-storage:[overlay@/a b+/run/c d]x:1",
            ImageKind.CONTAINERS_STORAGE,
            "containers-storage:[overlay@/a b+/run/c d]x:1",
        ),
        ("docker-daemon:x:1", ImageKind.DOCKER_DAEMON, "docker-daemon:x:1"),
    ],
)
def test_transports_are_skopeos_and_paths_start_at_the_base(tmp_path, text, kind, skopeo):
    reference = parse_reference(text, base=tmp_path)
    assert (reference.kind, reference.skopeo) == (kind, skopeo.format(tmp_path))
    assert not reference.is_local_registry


@pytest.mark.parametrize("name", ["fs.tar", "fs.tar.gz", "fs.tgz", "fs.tar.zst", "./fs.tar", "sub/fs.tar"])
def test_a_tar_without_a_transport_is_a_root_filesystem(tmp_path, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_bytes(b"")
    reference = parse_reference(name, base=tmp_path)
    assert (reference.kind, reference.skopeo, reference.path) == (ImageKind.ROOTFS_TAR, None, tmp_path / name)


@pytest.mark.parametrize("text", ["./rootfs", "sub/rootfs", "../{name}/rootfs", "{path}/rootfs"])
def test_a_path_of_a_directory_is_a_root_filesystem(tmp_path, text):
    for directory in ("rootfs", "sub/rootfs"):
        (tmp_path / directory).mkdir(parents=True)
    reference = parse_reference(text.format(name=tmp_path.name, path=tmp_path), base=tmp_path)
    assert (reference.kind, reference.skopeo) == (ImageKind.ROOTFS_DIR, None)
    assert reference.path is not None
    assert reference.path.is_dir()


def test_a_bare_name_is_never_a_directory(tmp_path):
    (tmp_path / "nginx").mkdir()
    assert parse_reference("nginx", base=tmp_path).kind is ImageKind.DOCKER


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rootfs").mkdir()
    assert parse_reference("~/rootfs", base=tmp_path / "elsewhere").path == tmp_path / "rootfs"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "-v",
        "--help",
        " nginx",
        "ngi nx",
        "nginx\n",
        "nginx\x00",
        "\x1b[31mnginx",
        "nginx:",
        "Nginx",
        "a//b",
        "docker:nginx",
        "docker://",
        "docker://-x",
        "oci:",
        "dir:-x",
        "containers-storage:",
        "containers-storage:a b",
        "nginx@sha256:short",
        "nginx:" + "t" * 200,
        "missing.tar",
        "./missing",
        "../missing.tar.gz",
    ],
)
def test_an_invalid_reference_is_a_usage_problem_with_a_hint(tmp_path, text):
    with pytest.raises(UsageProblem) as caught:
        parse_reference(text, base=tmp_path)
    assert caught.value.hint
    assert caught.value.message.isprintable()


@pytest.mark.parametrize("text", ["user:open-sesame@registry.example/x", "docker://user:open-sesame@127.0.0.1:5000/x"])
def test_a_password_in_a_name_is_refused_and_not_shown(tmp_path, text):
    with pytest.raises(UsageProblem) as caught:
        parse_reference(text, base=tmp_path)
    assert "open-sesame" not in str(caught.value)


@pytest.mark.parametrize(("marker", "transport"), [("oci-layout", "oci:"), ("manifest.json", "dir:")])
def test_an_image_layout_given_as_a_directory_is_reported(tmp_path, marker, transport):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / marker).touch()
    (tmp_path / "x" / "version").touch()
    with pytest.raises(UsageProblem) as caught:
        parse_reference("./x", base=tmp_path)
    assert f"{transport}./x" in caught.value.hint


def test_a_reference_can_be_pinned_to_a_digest(tmp_path):
    moved = parse_reference("localhost:5000/x/y:1", base=tmp_path).at_digest(DIGEST)
    assert moved.skopeo == f"docker://localhost:5000/x/y@{DIGEST}"
    assert moved.is_local_registry
    assert moved.pinned_digest == DIGEST


def test_a_reference_cannot_be_changed(tmp_path):
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_reference("nginx", base=tmp_path).text = "other"  # type: ignore[misc]


_MEANT = "reg:5000/nginx:1"


@pytest.mark.parametrize("typed", [f"{_MEANT} ", f" {_MEANT}", f"http://{_MEANT}", f"{_MEANT}\n"])
def test_the_hint_has_the_reference_without_its_scheme(typed: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        parse_reference(typed, base=Path("/"))
    assert caught.value.hint == f"write {_MEANT}"


@pytest.mark.parametrize("version", ["", ":7", "@sha256:" + "0" * 64])
def test_a_repository_has_neither_tag_nor_digest(version: str) -> None:
    assert parse_reference(f"127.0.0.1:5000/a/b{version}", base=Path("/")).repository == "127.0.0.1:5000/a/b"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("Nginx", "nginx"),
        ("docker://NGINX:Latest", "nginx:Latest"),
        ("127.0.0.1:5000/Team/App:V1", "127.0.0.1:5000/team/app:V1"),
        ("[::1]:5000/NGINX", "[::1]:5000/nginx"),
        ("ghcr.io/Org/App@sha256:" + "0" * 64, "ghcr.io/org/app@sha256:" + "0" * 64),
    ],
)
def test_capitals_in_a_repository_are_reported_with_the_lower_case_name(text: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="repository names are lower case") as caught:
        parse_reference(text, base=tmp_path)
    assert caught.value.hint == f"write {meant}"
    assert parse_reference(meant, base=tmp_path).skopeo


def test_a_registry_at_an_ipv6_loopback_address_is_local(tmp_path: Path) -> None:
    reference = parse_reference("[::1]:5000/nginx", base=tmp_path)
    assert (reference.skopeo, reference.registry) == ("docker://[::1]:5000/nginx:latest", "[::1]:5000")
    assert reference.is_local_registry
    assert reference.repository == "[::1]:5000/nginx"
