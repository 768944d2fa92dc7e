"""Real images for real VMs: built from distribution packages, served by a real registry on loopback."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_fcvm import SnapshotFactory, VmSpec
from pytest_fcvm.model.parse import parse_network
from tests.vm.cache import cache_of_this_run

_ROOT = Path(__file__).parents[2]
_TOOLS = ("qemu-system-x86_64", "skopeo", "mksquashfs", "mmdebstrap", "docker-registry")


@pytest.fixture(scope="session")
def built_image() -> Callable[[str], str]:
    """Return a function that builds an image and returns its `oci:` reference. Kept in .demo between runs."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"the VM tier requires {', '.join(missing)}: run `make test`, which installs them")
    build = runpy.run_path(str(_ROOT / "tests/images/library.py"))["build_image"]

    def reference(name: str) -> str:
        return f"oci:{build(name, _ROOT / '.demo')}:latest"

    return reference


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a registry on loopback and return its host:port."""
    library = runpy.run_path(str(_ROOT / "tests/images/library.py"))
    with library["start_registry"](tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="session")
def image(
    built_image: Callable[[str], str], registry: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """Return a function that builds an image, pushes it to the registry and returns the reference to pull."""
    pushed: dict[str, str] = {}
    logins = tmp_path_factory.mktemp("logins") / "auth.json"
    logins.write_text("{}")

    def reference(name: str) -> str:
        if name not in pushed:
            target = f"{registry}/{name}:latest"
            options = ["--quiet", "--dest-tls-verify=false", "--authfile", logins]
            subprocess.run(["skopeo", "copy", *options, built_image(name), f"docker://{target}"], check=True)
            pushed[name] = target
        return pushed[name]

    return reference


@pytest.fixture(scope="session")
def kernels(fcvm_snapshot_factory: SnapshotFactory) -> Path:
    """Return the directory with this session's guest kernel. It is a session fixture because pytester moves HOME."""
    fcvm_snapshot_factory()
    return cache_of_this_run() / "kernels"


@pytest.fixture
def cold_cache(kernels: Path, tmp_path: Path) -> Path:
    """Return a cache directory with only a guest kernel, so that no test downloads one again."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    shutil.copytree(kernels, cache / "kernels", symlinks=True)
    (cache / "kernels").chmod(0o700)
    return cache


@pytest.fixture(scope="session")
def fcvm_spec(image: Callable[[str], str]) -> VmSpec:
    """Make nginx the default image of every test, on the network that FCVM_NETWORK names."""
    return VmSpec(image=image("nginx"), network=parse_network(os.environ.get("FCVM_NETWORK", "auto")))
