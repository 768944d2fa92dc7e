"""The real docker-registry on a free port of the loopback interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER, PASSWORD = "tester", "open-sesame"
# PASSWORD by bcrypt, the only hash that the registry accepts
HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuutXu9KzOt.1yBoZUeFWoT/914/JfszCO\n"


@contextmanager
def running_registry(directory: Path, *, htpasswd: str = "") -> Iterator[str]:
    """Run a registry that keeps its content in `directory` and yield its "127.0.0.1:PORT"."""
    directory.mkdir(parents=True)
    (directory / "htpasswd").write_text(htpasswd)
    process, address = _start(directory, with_password=bool(htpasswd))
    try:
        yield address
    finally:
        process.kill()
        process.wait()


def _start(directory: Path, *, with_password: bool) -> tuple[subprocess.Popen[bytes], str]:
    """Start the registry. Try several ports, because another process may take a free one first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}
    for _ in range(5):
        address = _free_address()
        (directory / "config.yml").write_text(
            json.dumps(_configuration(directory, address, with_password=with_password))
        )
        with (directory / "log").open("wb") as log:
            command = ["docker-registry", "serve", directory / "config.yml"]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        if _answers(address, process):
            return process, address
        process.kill()
        process.wait()
    raise RuntimeError(f"the registry did not start: {(directory / 'log').read_text()}")


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _configuration(directory: Path, address: str, *, with_password: bool) -> dict[str, object]:
    htpasswd = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    return {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(directory / "data")}},
        "http": {"addr": address, "secret": "x"},
        "log": {"level": "error"},
        **({"auth": htpasswd} if with_password else {}),
    }


def _answers(address: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + 30
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        try:
            opener.open(f"http://{address}/v2/", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return True
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False
