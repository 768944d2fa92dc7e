"""A host where KVM works, for a real Firecracker: an emulated host, made with the project's QEMU engine.

QEMU emulates AMD's SVM, so that a guest with a distribution's kernel can be a host of KVM. The tests that run in it are
those of tests/vm, with the engine that is asked for. FCVM_TEST_FIRECRACKER names the Firecracker to test; its jailer is
tested too where it is beside it, and then both must be linked statically, as in a release.
"""

from __future__ import annotations

import compileall
import hashlib
import os
import runpy
import shutil
import site
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

from pytest_fcvm import Clone, Prepare, SnapshotFactory, VmSpec
from pytest_fcvm.errors import EngineError, FcvmError

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ("nginx", "redis", "postgres", "python", "java", "systemd")
HOST_MEM_MIB, HOST_DISK_MIB, HOST_CPUS = 3072, 10240, 1
ASKED_EVERY_S, ANSWERS_WITHIN_S = 30.0, 120.0
PREPARE_S, RUN_S = 1200.0, 3600.0
LIVES = 4  # QEMU's emulation of SVM loses a host now and then: an interrupt right after #VMEXIT, some minutes in
_PACKAGES = (
    "python3 kmod procps iproute2 util-linux mount e2fsprogs zstd lz4 skopeo squashfs-tools mmdebstrap docker-registry "
    "qemu-system-x86 busybox-static linux-image-cloud-amd64 nftables slirp4netns"
)
# The guest's kernel loads no modules by itself: the program for that is not in the image.
_MODULES = "kvm-amd tun veth nf_tables nft_chain_nat nft_nat nft_masq nft_ct nft_reject_ipv4"
_NOT_NEEDED = ("pip", "pip-*", "setuptools*", "mypy*", "ruff*", "ziglang*", "__editable__*", "*.pth", "__pycache__")
_ENVIRONMENT = {
    "PYTHONPATH": "/work/site:/work/project",
    "PATH": "/work/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "XDG_CACHE_HOME": "/var/cache",
}
# Probe KVM, and fill the cache with what every run requires: the guest's kernel and nginx.
_WARM_UP = "FCVM_ENGINE=firecracker python3 -m pytest -p no:cacheprovider tests/vm/test_clone.py -k answers_at_once"


@pytest.fixture(scope="session")
def firecracker() -> Path:
    """The Firecracker to test."""
    named = os.environ.get("FCVM_TEST_FIRECRACKER")
    if not named:
        pytest.skip("FCVM_TEST_FIRECRACKER names no Firecracker to test (make test-firecracker)")
    program = Path(named).resolve()
    assert os.access(program, os.X_OK), f"FCVM_TEST_FIRECRACKER: {program} is not a program"
    return program


@pytest.fixture(scope="session")
def jailer(firecracker: Path) -> Path:
    """The jailer to test: the one beside Firecracker."""
    program = firecracker.with_name("jailer")
    if not program.exists():
        pytest.skip(f"there is no jailer beside {firecracker}")
    return program


@dataclass(frozen=True)
class KvmHost:
    """Make emulated hosts with KVM, and run commands in them. `project` is a copy of this project."""

    clone: Callable[[], Clone]
    project: Path

    def run(self, command: str, out: Callable[[str], object]) -> int:
        """Run a command in a fresh host's copy of the project and return its exit code; its output goes to `out`.

        It is run again in another host when the host itself dies.
        """
        for life in range(1, LIVES + 1):
            with self.clone() as host:
                try:
                    return self._run_in(host, command, out)
                except EngineError as error:
                    out(f"the emulated host is dead ({error.message}), life {life} of {LIVES}\n")
        pytest.fail(f"{LIVES} emulated hosts died")

    def _run_in(self, host: Clone, command: str, out: Callable[[str], object]) -> int:
        host.copy_in(self.project, "/work/")
        shell = ["/bin/bash", "-c", f"cd /work/project && ln -sfn /work/images .demo && {command} 2>&1"]
        with host.popen(shell) as process, _watched(host):
            while data := process.stdout.read1():
                out(data.decode("utf-8", "replace"))
            return process.wait(RUN_S).returncode


@contextmanager
def _watched(host: Clone) -> Iterator[None]:
    """Kill a host that hangs: it loses interrupts, and then nothing in it runs or ends."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(ASKED_EVERY_S):
            try:
                host.exec("true", timeout=ANSWERS_WITHIN_S)
            except FcvmError:
                if not over.is_set():
                    host.kill()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@pytest.fixture(scope="session")
def host(
    firecracker: Path, fcvm_snapshot_factory: SnapshotFactory, tmp_path_factory: pytest.TempPathFactory
) -> KvmHost:
    """Hosts in which Firecracker works. Each is a clone of one that has all that the tests require."""
    project = _gather_project(tmp_path_factory.mktemp("host") / "project")
    payload = _gather_rest(tmp_path_factory.mktemp("payload"), firecracker)

    def prepare(base: Clone) -> None:
        base.succeed(f"modprobe -a {_MODULES} && mkdir -p /work")
        base.copy_in(payload, "/work")
        base.copy_in(project, "/work/")
        base.succeed(f"cd /work/project && ln -s /work/images .demo && {_WARM_UP}", timeout=PREPARE_S)
        base.succeed("rm -r /work/project")

    snapshot = fcvm_snapshot_factory(
        VmSpec(
            image=f"oci:{_build_host_image()}:latest",
            mem_mib=HOST_MEM_MIB,
            cpus=HOST_CPUS,
            disk_mib=HOST_DISK_MIB,
            ready_timeout_s=PREPARE_S,
            prepare=Prepare(prepare, version=_digest(payload)),
        )
    )
    return KvmHost(snapshot.clone, project)


def _build_host_image() -> Path:
    module = runpy.run_path(str(ROOT / "examples/images/build.py"))
    recipe = module["Recipe"](
        packages=tuple(_PACKAGES.split()),
        config={"Cmd": ["sleep", "infinity"], "Env": [f"{name}={value}" for name, value in _ENVIRONMENT.items()]},
        hooks=('rm -rf "$1"/boot/* "$1"/usr/share/qemu/edk2*',),
    )
    module["RECIPES"]["kvm-host"] = recipe
    directory = ROOT / ".demo"
    directory.mkdir(exist_ok=True)
    layout: Path = module["build"]("kvm-host", directory)
    return layout


def _gather_project(directory: Path) -> Path:
    directory.mkdir()
    for name in ("pytest_fcvm", "tests", "examples", "benchmarks", "guest_image", "conftest.py", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, directory / name)
    _compile(directory)
    return directory


def _gather_rest(directory: Path, firecracker: Path) -> Path:
    """Put into a directory what seldom changes: libraries, Firecracker, images."""
    packages = Path(next(path for path in site.getsitepackages() if path.startswith(sys.prefix)))
    if not (packages / "pytest_fcvm_kernel_x86_64/bzImage").exists():
        pytest.fail("the emulated host cannot download a kernel for its guests: run `make kernel`, which installs one")
    build = runpy.run_path(str(ROOT / "examples/images/build.py"))["build"]
    for name in IMAGES:
        shutil.copytree(build(name, ROOT / ".demo"), directory / "images" / name)
    shutil.copytree(packages, directory / "site", ignore=shutil.ignore_patterns(*_NOT_NEEDED))
    _compile(directory / "site")
    (directory / "bin").mkdir()
    shutil.copy2(firecracker, directory / "bin" / "firecracker")
    if (jailer := firecracker.with_name("jailer")).exists():
        shutil.copy2(jailer, directory / "bin" / "jailer")
    return directory


def _compile(directory: Path) -> None:
    """Compile Python on this host, where it takes seconds. An emulated host would do it in every pytest.

    A host whose Python is another one compiles by itself. The bytecode holds whatever time a copy of its source has.
    """
    modes = PycInvalidationMode
    compileall.compile_dir(
        directory,
        quiet=2,
        stripdir=directory,
        prependdir=f"/work/{directory.name}",
        force=True,
        invalidation_mode=modes.UNCHECKED_HASH,
    )


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
