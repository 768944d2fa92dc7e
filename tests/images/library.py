"""Real images for tests and benchmarks without a public registry: build, serve on loopback, run in podman.

The recipes are those of examples/images/build.py. Load this file by runpy: test directories are not packages.
"""

from __future__ import annotations

import re
import resource
import runpy
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.process import killed_with_us, resolve_tool, run_tool

__all__ = ["build_image", "podman_limits", "push", "start_registry"]

_RECIPES = Path(__file__).parents[2] / "examples/images/build.py"
_LISTENING = re.compile(r'msg="listening on (127\.0\.0\.1:\d+)"')
_COPY_S = 120.0
_START_S = 30.0
_MAX_LIMIT = 4096  # files, or processes, of a container


def build_image(name: str, dest_dir: Path) -> Path:
    """Return the OCI layout DEST_DIR/NAME (nginx, redis or postgres). Build it unless it is up to date.

    A build takes 10 to 30 s. Of several processes one builds, and the others wait.
    """
    dest_dir.mkdir(parents=True, exist_ok=True)
    build: Callable[[str, Path], Path] = runpy.run_path(str(_RECIPES))["build"]
    with FileLock(dest_dir / f"{name}.lock"):
        return build(name, dest_dir)


def push(layout: Path, registry: str) -> str:
    """Push an OCI layout to a registry without TLS and return the reference to pull, HOST:PORT/NAME:latest."""
    reference = f"{registry}/{layout.name}:latest"
    skopeo = resolve_tool("skopeo", package="skopeo")
    command: list[str | Path] = [
        skopeo,
        "copy",
        "--quiet",
        "--dest-tls-verify=false",
        f"oci:{layout}:latest",
        f"docker://{reference}",
    ]
    run_tool(command, timeout_s=_COPY_S)
    return reference


@contextmanager
def start_registry(directory: Path) -> Iterator[str]:
    """Run a registry that keeps its data in a directory, and yield its HOST:PORT on loopback.

    The registry chooses the port, and ends with the thread that started it, even if that thread is killed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config, log = directory / "config.yml", directory / "log"
    config.write_text(
        "version: 0.1\nlog: {level: info, accesslog: {disabled: true}}\nhttp: {addr: '127.0.0.1:0'}\n"
        f"storage: {{filesystem: {{rootdirectory: '{directory / 'data'}'}}}}\n"
    )
    command = [*killed_with_us(), resolve_tool("docker-registry", package="docker-registry"), "serve", config]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        wait_until(lambda: _LISTENING.search(log.read_text()) or server.poll() is not None, Deadline(_START_S))
        listening = _LISTENING.search(log.read_text())
        if listening is None:
            raise RuntimeError(f"docker-registry does not listen:\n{log.read_text()}")
        yield listening[1]
    finally:
        server.kill()
        server.wait()


def podman_limits() -> list[str]:
    """Return the options with which podman starts containers if root lacks CAP_SYS_RESOURCE.

    podman's own limits are above those of this process, and only that capability may raise limits.
    """
    limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    return [f"--ulimit={name}={_at_most(which)}" for name, which in limits.items()]


def _at_most(which: int) -> int:
    """Return a limit that podman may set: podman lowers its own (nproc to 32768) before it starts the container."""
    _soft, hard = resource.getrlimit(which)
    return _MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MAX_LIMIT)
