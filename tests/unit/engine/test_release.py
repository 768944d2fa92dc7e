"""A release of Firecracker from a server on loopback: complete, cut off, damaged, missing."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_fcvm.cli import main
from pytest_fcvm.engine.firecracker.installation import find_firecracker
from pytest_fcvm.engine.firecracker.release import install_release
from pytest_fcvm.errors import HostError, UsageProblem

ARCHIVE = "firecracker-v1.16.1-x86_64.tgz"
PADDING = os.urandom(300_000)  # so that an archive is long enough to be cut


def _program(version: str = "1.16.1") -> bytes:
    return f"#!/bin/sh\necho Firecracker v{version}\nexit 0\n".encode() + PADDING


def _release(**programs: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in programs.items():
            member = tarfile.TarInfo(f"release-v1.16.1-x86_64/{name}-v1.16.1-x86_64")
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


class Mirror:
    """A server of releases. `cut` ends the next answer after that many bytes; `ranges` allows partial content."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut, self.ranges = 0, True
        self.asked: list[tuple[str, str | None]] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/download/"
        threading.Thread(target=self._server.serve_forever).start()

    def publish(self, data: bytes, digest: str | None = None) -> None:
        self.files[ARCHIVE] = data
        self.files[f"{ARCHIVE}.sha256.txt"] = f"{digest or hashlib.sha256(data).hexdigest()}  {ARCHIVE}\n".encode()

    def serve(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name, part = request.path.removeprefix("/download/v1.16.1/"), request.headers.get("Range")
        self.asked.append((name, part))
        data = self.files.get(name)
        if data is None:
            request.send_error(404)
            return
        start = int(part.removeprefix("bytes=").rstrip("-")) if part and self.ranges else 0
        if start >= len(data):
            request.send_error(416)
            return
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        cut, self.cut = (0, self.cut) if name.endswith(".txt") else (self.cut, 0)
        request.wfile.write(data[start:][: cut or None])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    mirror.publish(_release(firecracker=_program(), jailer=b"a jailer"))
    yield mirror
    mirror.close()


@pytest.fixture
def install(mirror: Mirror, tmp_path: Path) -> Callable[..., Path]:
    """Install from the mirror; `install.said` has the lines of progress."""

    def install(version: str = "1.16.1") -> Path:
        return install_release(version, tmp_path, said.append, mirror.url)

    said: list[str] = []
    install.said = said  # type: ignore[attr-defined]
    return install


def _left(directory: Path) -> set[str]:
    return {path.name for path in (directory / "tools").iterdir()}


def test_a_release_is_downloaded_verified_and_found_by_the_engine(
    install: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = install()
    monkeypatch.setenv("PATH", "")
    assert find_firecracker(None, tmp_path) == program
    assert program.read_bytes() == _program()
    assert _left(tmp_path) == {"firecracker", "jailer"}
    assert any(" % of " in line for line in install.said)  # type: ignore[attr-defined]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_off_is_resumed(
    install: Callable[..., Path], mirror: Mirror, tmp_path: Path, ranges: bool
) -> None:
    mirror.cut, mirror.ranges = 100_000, ranges
    with pytest.raises(HostError, match="peer closed connection") as caught:
        install()
    assert "the downloaded part is kept" in caught.value.hint
    assert _left(tmp_path) == {f"{ARCHIVE}.part"}
    assert install().read_bytes() == _program()
    assert mirror.asked[-1] == (ARCHIVE, "bytes=100000-")


def test_a_complete_download_is_not_repeated(install: Callable[..., Path], mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / f"{ARCHIVE}.part").write_bytes(mirror.files[ARCHIVE])
    assert install().read_bytes() == _program()


def test_a_damaged_archive_is_removed_and_the_installed_program_stays(
    install: Callable[..., Path], mirror: Mirror, tmp_path: Path
) -> None:
    before = install().read_bytes()
    mirror.files[ARCHIVE] = mirror.files[ARCHIVE][:-1] + b"?"
    with pytest.raises(HostError, match="has the SHA-256") as caught:
        install()
    assert caught.value.hint.startswith("try again, or name a mirror of the releases with --base-url")
    assert (tmp_path / "tools" / "firecracker").read_bytes() == before
    assert _left(tmp_path) == {"firecracker", "jailer"}


def test_a_missing_release_is_named(install: Callable[..., Path], mirror: Mirror) -> None:
    mirror.files.clear()
    with pytest.raises(HostError, match=rf"there is no http://.*{ARCHIVE}\.sha256\.txt") as caught:
        install()
    assert "--version 1.16.1" in caught.value.hint


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"no archive at all", "is not a release of Firecracker"),
        (_release(firecracker=_program()), "is not a release of Firecracker"),
        (_release(firecracker=_program("1.15.1"), jailer=b""), "reports 'Firecracker v1.15.1'"),
        (_release(firecracker=b"#!/bin/sh\nexit 7\n", jailer=b""), "does not run on this host"),
    ],
)
def test_a_release_that_does_not_work_is_not_installed(
    install: Callable[..., Path], mirror: Mirror, tmp_path: Path, data: bytes, words: str
) -> None:
    mirror.publish(data)
    with pytest.raises(HostError, match=words):
        install()
    assert not (tmp_path / "tools" / "firecracker").exists()
    assert not list((tmp_path / "tools").glob("*.new"))


def test_a_file_without_a_digest_is_reported(install: Callable[..., Path], mirror: Mirror) -> None:
    mirror.publish(b"", digest="<html>")
    with pytest.raises(HostError, match="is not a SHA-256"):
        install()


def test_invalid_and_broken_versions_are_not_requested(install: Callable[..., Path], mirror: Mirror) -> None:
    with pytest.raises(UsageProblem, match="'newest' is not a version"):
        install("newest")
    with pytest.raises(HostError, match=r"Firecracker 1\.16\.0 is not used"):
        install("1.16.0")
    assert mirror.asked == []


def test_the_command_installs_and_says_where(
    mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["setup", "firecracker", "--cache-dir", str(tmp_path), "--base-url", mirror.url]
    assert main([*command, "--dry-run"]) == 0
    assert mirror.asked == []
    assert main(command) == 0
    assert f"ready: {tmp_path}/tools/firecracker" in capsys.readouterr().err
