"""Whole runs of pytest in their own processes. The entry point loads the plugin, and no VM is started."""

from __future__ import annotations

import http.server
import json
import os
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Plugins that may be installed and would interfere. A test that wants one turns it on.
_QUIET = ("-p", "no:randomly", "-p", "no:asyncio", "-p", "no:cacheprovider", "-W", "error")
_WATCH = """
import json, os
import pytest

def pytest_fcvm_modify_spec(spec, item):
    seen = {
        "test": item.nodeid if item else None, "image": spec.image, "mem": spec.mem_mib, "env": dict(spec.env),
        "publish": [port.guest_port for port in spec.publish], "map": [str(path) for path in spec.map],
        "ready": str(spec.ready), "command": spec.command,
    }
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps(seen) + "\\n")
    pytest.skip("seen")
"""


@dataclass
class Project:
    """A directory of tests in which pytest is run."""

    pytester: pytest.Pytester
    monkeypatch: pytest.MonkeyPatch

    @property
    def path(self) -> Path:
        return self.pytester.path

    def write(self, **files: str) -> None:
        """Write files. `a__b_py` is `a/b.py`."""
        for name, text in files.items():
            *directories, file = name.split("__")
            path = self.path.joinpath(*directories, ".".join(file.rsplit("_", 1)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def run(self, *arguments: str, **environment: str) -> pytest.RunResult:
        """Run pytest in the project's directory."""
        for name, value in environment.items():
            self.monkeypatch.setenv(name, value)
        return self.pytester.runpytest_subprocess(*_QUIET, *arguments, timeout=120)

    def watch(self, *arguments: str, **environment: str) -> list[dict[str, Any]]:
        """Run pytest, which skips every test, and return the spec that each test asked for, in order."""
        seen = self.path / "seen.jsonl"
        seen.unlink(missing_ok=True)
        self.write(watch_py=_WATCH)
        result = self.run("-p", "watch", *arguments, SEEN=str(seen), PYTHONPATH=_joined_path(self.path), **environment)
        outcomes = result.parseoutcomes()
        assert set(outcomes) <= {"skipped", "deselected", "passed"}, result.outlines
        return [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []


def _joined_path(first: Path) -> str:
    return ":".join([str(first), *filter(None, [os.environ.get("PYTHONPATH", "")])])


@pytest.fixture
def project(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    """An empty project whose runs have their own cache."""
    for name in list(os.environ):
        if name.startswith(("FCVM_", "PYTEST_ADDOPTS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return Project(pytester, monkeypatch)


@pytest.fixture
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system that can be packed."""
    directory = tmp_path_factory.mktemp("rootfs")
    (directory / "etc").mkdir()
    (directory / "etc/os-release").write_text("ID=nothing\n")
    return directory


@pytest.fixture
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the header of a bzImage."""
    image = bytearray(4096)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x20E, 0x300)
    image[0x500:0x520] = b"6.1.0-test (builder)".ljust(32, b"\0")
    path = tmp_path_factory.mktemp("kernel") / "bzImage"
    path.write_bytes(image)
    return path


@pytest.fixture
def without_engine(rootfs: Path, kernel: Path) -> tuple[str, ...]:
    """Options of a run that has everything but an engine."""
    return ("--fcvm-image", str(rootfs), "--fcvm-kernel", str(kernel), "--fcvm-qemu", "/bin/false")


@pytest.fixture
def needs(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Skip a test if a plugin or library is missing."""

    def check(module: str) -> None:
        pytest.importorskip(module, reason=f"{module} is not installed; `make test` installs it")

    return check


class Registry:
    """A registry on loopback whose first clients wait until the test lets it refuse them."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()
        asked, answer = self.asked, self.answer

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.set()
                answer.wait(60)
                self.send_error(404)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.image = f"127.0.0.1:{self.server.server_port}/slow:1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


@pytest.fixture
def registry() -> Iterator[Registry]:
    """A slow registry."""
    registry = Registry()
    yield registry
    registry.answer.set()
    registry.server.shutdown()
    registry.server.server_close()
