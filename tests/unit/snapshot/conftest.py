"""Snapshots built from and cloned to fake VMs, whose agents keep the protocol's rules."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.engine.protocol import GuestFiles
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.image.config import ImageConfig
from pytest_fcvm.model.specs import VmSpec
from pytest_fcvm.snapshot import OpenSnapshot, SnapshotInputs, SnapshotRuntime, build_snapshot, choose_ready
from pytest_fcvm.store import Entry

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `fakes`

from fakes.agent import FakeAgent
from fakes.vm import FakeEngine, Service

_OURS = ("fcvm-session", "fake-agent", "fcvm-relay", "fcvm-standby", "fcvm-pool")
_IMAGE = ImageConfig(
    entrypoint=("/entry",),
    cmd=("serve",),
    env=("PATH=/bin", "LEVEL=image"),
    user="www",
    working_dir="/srv",
    exposed_ports=((53, "udp"), (80, "tcp")),
)


@pytest.fixture
def agents() -> Iterator[ExitStack]:
    """The agents of all VMs; they outlive whatever talks to them, and then no thread of ours lives."""
    with ExitStack() as agents:
        yield agents
    _wait_for_threads(_OURS)


@pytest.fixture
def stack(agents: ExitStack) -> Iterator[ExitStack]:
    """What is closed after the test."""
    with ExitStack() as stack:
        yield stack
    _wait_for_threads(("fcvm-standby", "fcvm-pool"))


def _wait_for_threads(names: tuple[str, ...]) -> None:
    left = lambda: [thread.name for thread in threading.enumerate() if thread.name in names]  # noqa: E731
    assert wait_until(lambda: not left(), Deadline(10)), left()


@pytest.fixture
def service(stack: ExitStack) -> Service:
    """A web server that plays guest port 80."""
    service = Service()
    stack.callback(service.close)
    return service


@pytest.fixture
def engine(agents: ExitStack, tmp_path: Path, service: Service) -> FakeEngine:
    """An engine of fake VMs; the service listens in each of them."""
    root = tmp_path / "guest"
    (root / "etc").mkdir(parents=True)
    engine = FakeEngine(tmp_path / "run", lambda: agents.enter_context(FakeAgent()))

    def prepare(agent: FakeAgent) -> None:
        agent.root, agent.ports[80], agent.listening[80] = root, service.address, 1
        agent.metrics["workload_cpu_us"] = "1000"  # it rests

    engine.prepare_guest = prepare
    return engine


@pytest.fixture
def make_inputs(engine: FakeEngine, tmp_path: Path) -> Callable[..., SnapshotInputs]:
    """Return the inputs of a snapshot; keyword arguments are fields of the spec, or of the inputs themselves."""

    def make(**fields: Any) -> SnapshotInputs:
        own = {name: fields.pop(name) for name in ("image_config", "kernel_digest", "rootfs_key") if name in fields}
        spec = VmSpec(image="registry/web:1").merged(fields)
        image: ImageConfig = own.pop("image_config", _IMAGE)
        ready = choose_ready(spec.ready, image)
        inputs: dict[str, Any] = {"kernel_digest": "kernel", "kernel_release": "6.1", "rootfs_key": "rootfs", **own}
        return SnapshotInputs(
            spec=spec,
            ready=ready,
            ready_joined=ready,
            image=image,
            image_digest="sha256:1",
            files=GuestFiles(kernel=tmp_path / "kernel", initramfs=tmp_path / "initramfs", rootfs=tmp_path / "rootfs"),
            initramfs_key="initramfs",
            engine=engine,
            report=engine.report,
            network=spec.network.finalize(engine.networks, engine.name),
            **inputs,
        )

    return make


@pytest.fixture
def open_built(tmp_path: Path, stack: ExitStack) -> Callable[[SnapshotInputs, SnapshotRuntime], OpenSnapshot]:
    """Build a snapshot and open it; it is closed after the test."""

    def open_(inputs: SnapshotInputs, runtime: SnapshotRuntime) -> OpenSnapshot:
        directory = tmp_path / "entry"
        directory.mkdir()
        facts = build_snapshot(inputs, directory, lambda _phase: None)
        snapshot = OpenSnapshot(entry=Entry(path=directory, key="0" * 64, facts=facts), inputs=inputs, runtime=runtime)
        stack.callback(snapshot.close)
        return snapshot

    return open_
