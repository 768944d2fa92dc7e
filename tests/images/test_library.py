"""The images that other tests use: valid, built once, served by a registry, with the expected behaviour."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from pytest_fcvm.host.clock import Deadline, wait_until

_LIBRARY = Path(__file__).with_name("library.py")
_TOOLS = ("mmdebstrap", "skopeo", "docker-registry", "setpriv")
_LAYOUTS = Path(__file__).parents[2] / ".demo"

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in _TOOLS), reason=f"needs {', '.join(_TOOLS)}: run `make test`"
)


@dataclass(frozen=True)
class Library:
    """The functions of library.py."""

    build_image: Callable[[str, Path], Path]
    push: Callable[[Path, str], str]
    start_registry: Callable[[Path], AbstractContextManager[str]]
    podman_limits: Callable[[], list[str]]


@pytest.fixture(scope="session")
def library() -> Library:
    names = runpy.run_path(str(_LIBRARY))
    return Library(**{name: names[name] for name in names["__all__"]})


def blob(layout: Path, digest: str) -> bytes:
    data = (layout / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest.removeprefix("sha256:")
    return data


def read_json(layout: Path, digest: str) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads(blob(layout, digest)))


@pytest.mark.parametrize(
    ("name", "port", "stop_signal", "program"),
    [
        ("nginx", "80/tcp", "SIGQUIT", "usr/sbin/nginx"),
        ("redis", "6379/tcp", None, "usr/bin/redis-server"),
        ("postgres", "5432/tcp", "SIGINT", "usr/local/bin/postgres-entrypoint.sh"),
    ],
)
def test_a_layout_is_valid_and_configured(
    name: str, port: str, stop_signal: str | None, program: str, library: Library
) -> None:
    layout = library.build_image(name, _LAYOUTS)
    manifest = read_json(layout, json.loads((layout / "index.json").read_text())["manifests"][0]["digest"])
    config = read_json(layout, manifest["config"]["digest"])
    (layer,) = manifest["layers"]
    assert config["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(blob(layout, layer["digest"])).hexdigest()]
    assert list(config["config"]["ExposedPorts"]) == [port]
    assert config["config"].get("StopSignal") == stop_signal
    with tarfile.open(layout / "blobs/sha256" / layer["digest"].removeprefix("sha256:")) as content:
        members = {member.name.removeprefix("./"): member for member in content}
    assert members[program].mode & 0o111
    assert not any(member.isdev() for member in members.values())


def test_an_image_is_built_once(library: Library) -> None:
    before = (library.build_image("nginx", _LAYOUTS) / "index.json").stat()
    assert (library.build_image("nginx", _LAYOUTS) / "index.json").stat() == before


def test_two_builders_at_once_build_one_image(tmp_path: Path) -> None:
    script = (
        f"import runpy, pathlib; print(runpy.run_path({str(_LIBRARY)!r})['build_image']('redis', pathlib.Path('.')))"
    )
    command = [sys.executable, "-c", script]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    said = [builder.communicate(timeout=300) for builder in both]
    assert [builder.returncode for builder in both] == [0, 0], said
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["redis"]


def test_a_pushed_image_can_be_pulled(library: Library, tmp_path: Path) -> None:
    layout = library.build_image("nginx", _LAYOUTS)
    with library.start_registry(tmp_path) as registry:
        reference = library.push(layout, registry)
        assert reference == f"{registry}/nginx:latest"
        command = ["skopeo", "inspect", "--config", "--tls-verify=false", f"docker://{reference}"]
        config = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert config["config"]["Cmd"] == ["nginx", "-g", "daemon off;"]
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://{registry}/v2/", timeout=5)


def test_a_registry_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    script = (
        f"import runpy, pathlib, time; start = runpy.run_path({str(_LIBRARY)!r})['start_registry']\n"
        "with start(pathlib.Path('.').resolve()) as registry: print(registry, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        address = owner.stdout.readline().strip()
        assert answers(f"http://{address}/v2/")
        owner.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not answers(f"http://{address}/v2/"), Deadline(5))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


# -- the images in containers


@dataclass(frozen=True)
class Podman:
    """Podman with its own store, so that no files stay on the host."""

    command: list[str]
    limits: list[str]

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """Run a podman command and return the output of both streams."""
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, timeout=120)
        assert not (check and done.returncode), done.stderr
        return done.stdout + done.stderr

    @property
    def options(self) -> list[str]:
        """The options of a container: without a network, from a registry without TLS."""
        return ["--quiet", "--network=none", "--tls-verify=false", *self.limits]

    def start(self, image: str, *options: str) -> str:
        """Start a container and return its id."""
        return self("run", "--detach", *self.options, *options, image).splitlines()[-1]


@pytest.fixture(scope="session")
def podman(library: Library, image: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    directory = tmp_path_factory.mktemp("podman")
    podman = Podman(["podman", "--root", f"{directory}/root", "--runroot", f"{directory}/run"], library.podman_limits())
    try:
        trial = podman("run", "--rm", *podman.options, image("redis"), "echo", "it works", check=False)
        if "it works" not in trial:
            pytest.skip(f"podman cannot run a container here: {trial.strip()[-300:]}")
        yield podman
    finally:
        podman("rm", "--all", "--force", "--time=0", check=False)
        podman("rmi", "--all", "--force", check=False)


@pytest.fixture(scope="session")
def image(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Return a function that builds an image and returns the reference to pull."""
    with library.start_registry(tmp_path_factory.mktemp("registry")) as registry:
        yield lambda name: library.push(library.build_image(name, _LAYOUTS), registry)


def test_nginx_serves_and_logs_to_its_output(podman: Podman, image: Callable[[str], str]) -> None:
    container = podman.start(image("nginx"))
    fetch = "exec 3<>/dev/tcp/127.0.0.1/80; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; head -1 <&3"
    assert wait_until(lambda: "200 OK" in podman("exec", container, "bash", "-c", fetch, check=False), Deadline(20))
    assert '"GET / HTTP/1.0" 200' in podman("logs", container)


def test_redis_answers_as_its_own_user(podman: Podman, image: Callable[[str], str]) -> None:
    container = podman.start(image("redis"))
    assert wait_until(lambda: "PONG" in podman("exec", container, "redis-cli", "ping", check=False), Deadline(20))
    assert "(redis)" in podman("exec", container, "id")


def test_postgres_requires_a_password(podman: Podman, image: Callable[[str], str]) -> None:
    said = podman("run", "--rm", *podman.options, image("postgres"), check=False)
    assert "superuser password is not specified" in said


def test_postgres_shows_its_temporary_server_only_on_the_socket(
    podman: Podman, image: Callable[[str], str], tmp_path: Path
) -> None:
    (tmp_path / "10-rows.sql").write_text("CREATE TABLE t AS SELECT generate_series(1, 3) AS n;")
    (tmp_path / "20-where.sh").write_text('psql -U "$POSTGRES_USER" -Atc "SHOW listen_addresses" | sed "s/^/heard:/"')
    tmp_path.chmod(0o755)
    scripts = f"--volume={tmp_path}:/docker-entrypoint-initdb.d:ro"
    container = podman.start(image("postgres"), "--env=POSTGRES_PASSWORD=x", scripts)
    ready = re.compile("init process complete; ready for start up.*ready to accept connections", re.DOTALL)
    assert wait_until(lambda: ready.search(podman("logs", container)), Deadline(60)), podman("logs", container)
    before, _, after = podman("logs", container).partition("PostgreSQL init process complete")
    assert re.search("^heard:$", before, re.MULTILINE)
    assert "listening on Unix socket" in before
    assert "listening on IPv4" not in before
    assert 'listening on IPv4 address "0.0.0.0", port 5432' in after
    query = ["psql", "-U", "postgres", "-Atc", "SELECT count(*) FROM t"]
    assert podman("exec", container, *query).strip() == "3"
    assert "postgres" in podman("exec", container, "stat", "-c", "%U", "/proc/1")
