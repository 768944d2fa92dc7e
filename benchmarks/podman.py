"""The same nginx image in podman, with a temporary storage of its own."""

from __future__ import annotations

import runpy
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from http200 import fetch_until_200

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.clock import monotonic

__all__ = ["NotHere", "Podman", "start_podman"]

_LIBRARY = Path(__file__).parents[1] / "tests/images/library.py"
_TOOLS = ("podman", "docker-registry", "skopeo", "setpriv")
_COMMAND_S = 120


class NotHere(Exception):
    """podman cannot run the image on this host; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Podman:
    """A podman that has run the image once. `network` is "published" or "host"."""

    command: Sequence[str]
    options: Sequence[str]
    image: str
    network: str

    def round(self) -> dict[str, float]:
        """Run a container, wait until it answers, remove it. Return the ms of each step by its key."""
        port = _find_port() if self.network == "published" else 80
        publish = [f"--publish=127.0.0.1:{port}:80"] if self.network == "published" else ["--network=host"]
        started = monotonic()
        container = self("run", "--detach", *self.options, *publish, self.image).split()[-1]
        running = monotonic()
        try:
            fetch_until_200(f"http://127.0.0.1:{port}/")
            answered = monotonic()
        finally:
            removing = monotonic()
            # Without a grace period: a clone is killed too.
            self("rm", "--force", "--time=0", container)
        removed = monotonic()
        return {
            "podman_run": (running - started) * 1e3,
            "podman_200": (answered - started) * 1e3,
            "podman_rm": (removed - removing) * 1e3,
            "podman_life": (removed - started) * 1e3,
        }

    def facts(self) -> dict[str, str]:
        """Return the facts that affect its speed: version, runtime, storage driver, network."""
        form = "{{.Version.Version}}|{{.Host.OCIRuntime.Name}}|{{.Store.GraphDriverName}}"
        version, runtime, driver = self("info", "--format", form).strip().split("|")
        return {"podman": f"{version}, {runtime}, {driver} storage, {self.network} port"}

    def __call__(self, *arguments: str) -> str:
        """Run a podman command and return its standard output. Raise NotHere with the end of its error output."""
        try:
            done = subprocess.run(
                [*self.command, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_COMMAND_S,
            )
        except subprocess.TimeoutExpired as error:
            raise NotHere(f"podman {arguments[0]} did not end within {_COMMAND_S} s") from error
        if done.returncode:
            raise NotHere(f"podman {arguments[0]}: {' '.join(done.stderr.split())[-400:]}")
        return done.stdout


@contextmanager
def start_podman(layout: Path, directory: Path, network: str = "") -> Iterator[Podman]:
    """Yield a podman that has pulled the image of an OCI layout and run it once. Raise NotHere if that fails.

    With `network`, taken from another podman that has run, the image is only pulled: it need not be a web server.
    """
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise NotHere(f"{', '.join(missing)} not installed")
    library = runpy.run_path(str(_LIBRARY))
    # Most container hosts have runc. Without it, podman chooses.
    runtime = ["--runtime=runc"] if shutil.which("runc") else []
    command = ["podman", "--root", f"{directory}/root", "--runroot", f"{directory}/run", *runtime]
    with ExitStack() as stack:
        try:
            registry = stack.enter_context(library["start_registry"](directory / "registry"))
            image = library["push"](layout, registry)
        except (FcvmError, RuntimeError, OSError) as error:
            raise NotHere(f"the image cannot be served to it: {error}") from error
        stack.callback(_clean, command)
        options = ["--quiet", "--tls-verify=false", *library["podman_limits"]()]
        if not network:
            yield _first_that_works(command, options, image)
            return
        podman = Podman(command=command, options=options, image=image, network=network)
        podman("pull", "--quiet", "--tls-verify=false", image)
        yield podman


def _first_that_works(command: Sequence[str], options: Sequence[str], image: str) -> Podman:
    """Try a published port, then the host's network, which works without a bridge and is less work for podman."""
    reasons = []
    for network in ("published", "host"):
        podman = Podman(command=command, options=options, image=image, network=network)
        try:
            podman.round()
        except (NotHere, TimeoutError) as error:
            reasons.append(f"{network} port: {error}")
        else:
            return podman
    raise NotHere("; ".join(reasons))


def _find_port() -> int:
    """Return a port that was free a moment ago. Asking podman for its choice would cost another command."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _clean(command: Sequence[str]) -> None:
    for arguments in (("rm", "--all", "--force", "--time=0"), ("rmi", "--all", "--force")):
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_S)
