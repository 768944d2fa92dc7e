"""Say whether this host has CA certificates where skopeo looks for them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pytest_fcvm.host.own import environment

__all__ = ["has_certificates"]

# Go's crypto/x509, root_linux.go
_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
_DIRECTORIES = ("/etc/ssl/certs", "/etc/pki/tls/certs")


def has_certificates(files: Iterable[str] = _FILES, directories: Iterable[str] = _DIRECTORIES) -> bool:
    """Say whether a file or a directory has certificates. `SSL_CERT_FILE` and `SSL_CERT_DIR` replace the defaults."""
    named_file, named_directories = environment().get("SSL_CERT_FILE"), environment().get("SSL_CERT_DIR")
    files = [named_file] if named_file else files
    directories = named_directories.split(":") if named_directories else directories
    return any(_has_content(Path(file)) for file in files) or any(map(_has_files, directories))


def _has_files(directory: str) -> bool:
    with suppress(OSError):
        return any(map(_has_content, Path(directory).iterdir()))
    return False


def _has_content(path: Path) -> bool:
    with suppress(OSError):
        return path.is_file() and path.stat().st_size > 0
    return False
