"""How skopeo is run: the policy for a host without one, and the reason where there are no CA certificates."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_fcvm.errors import ImageError
from pytest_fcvm.host import process
from pytest_fcvm.host.process import ToolFailed
from pytest_fcvm.image import skopeo
from pytest_fcvm.image.certificates import has_certificates
from pytest_fcvm.image.reference import ImageReference, parse_reference

_UNTRUSTED = 'time="x" level=fatal msg="pinging registry: x509: certificate signed by unknown authority"'
_ECHO = '#!/bin/sh\necho "$@"\n'


@pytest.fixture
def reference(tmp_path: Path) -> ImageReference:
    return parse_reference("docker://registry.example/x:1", base=tmp_path)


@pytest.fixture
def without_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for the policies of a host that has none."""
    monkeypatch.setattr(skopeo, "_POLICIES", (str(tmp_path / "policy.json"),))


def _write_skopeo(directory: Path) -> Path:
    directory.mkdir()
    (directory / "skopeo").write_text(_ECHO)
    (directory / "skopeo").chmod(0o755)
    return directory


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a wheel whose skopeo prints its arguments, on a host without skopeo."""
    find_on_path = process.find_program
    monkeypatch.setattr(process, "find_program", lambda name: None if name == "skopeo" else find_on_path(name))
    directory = _write_skopeo(tmp_path / "pytest_fcvm_tools_x86_64")
    (directory / "__init__.py").touch()
    (directory / "policy.json").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return directory


@pytest.mark.usefixtures("without_policy")
def test_the_wheels_skopeo_gets_the_wheels_policy(wheel: Path, reference: ImageReference) -> None:
    assert skopeo.ask_manifest(reference).startswith(f"--policy {wheel / 'policy.json'} inspect --raw".encode())


@pytest.mark.usefixtures("without_policy")
def test_the_hosts_skopeo_runs_without_a_policy(
    tmp_path: Path, reference: ImageReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _write_skopeo(tmp_path / "bin")
    (directory / "policy.json").touch()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    assert skopeo.ask_manifest(reference).startswith(b"--insecure-policy inspect --raw")


@pytest.mark.usefixtures("wheel", "without_policy")
def test_the_hosts_own_policy_is_kept(tmp_path: Path, reference: ImageReference) -> None:
    (tmp_path / "policy.json").touch()
    assert skopeo.ask_manifest(reference).startswith(b"inspect --raw")


def _error(reference: ImageReference) -> ImageError:
    failed = ToolFailed("skopeo failed")
    failed.stderr = _UNTRUSTED
    return skopeo.image_error(failed, reference, "amd64")


def test_a_host_without_ca_certificates_is_told_so(
    tmp_path: Path, reference: ImageReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    error = _error(reference)
    assert error.message.endswith("certificate signed by unknown authority; this host has no CA certificates")
    assert error.hint.startswith("apt-get install ca-certificates, or set SSL_CERT_FILE to a file of CA certificates")


def test_with_ca_certificates_the_registrys_own_is_missing(
    tmp_path: Path, reference: ImageReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    error = _error(reference)
    assert "this host has no CA" not in error.message
    assert error.hint == "put the registry's CA certificate into /etc/containers/certs.d/registry.example/ca.crt"


def test_certificates_are_in_files_or_in_directories_and_an_empty_file_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    file, directory = tmp_path / "ca.pem", tmp_path / "certs"
    places = {"files": [str(file)], "directories": [str(directory)]}
    assert not has_certificates(**places)
    file.touch()
    directory.mkdir()
    assert not has_certificates(**places)
    (directory / "0123abcd.0").write_text("x")
    assert has_certificates(**places)
    assert not has_certificates(files=[str(file)], directories=[])
    file.write_text("x")
    assert has_certificates(files=[str(file)], directories=[])
