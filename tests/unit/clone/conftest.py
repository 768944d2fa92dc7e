"""Clones of a fake VM whose agent is the fake that keeps the protocol's rules."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from pytest_fcvm.clone import Clone, RunningVm, Snapshot, WorkloadLog
from pytest_fcvm.clone.commands import ExecDefaults
from pytest_fcvm.engine.protocol import RestorePlan, SnapshotFiles, VmShape
from pytest_fcvm.guest.agent import start_session
from pytest_fcvm.guest.frames import PROTOCOL_BOOT_SECRET
from pytest_fcvm.host.clock import Deadline, monotonic, wait_until
from pytest_fcvm.model.net import PublishedPort
from pytest_fcvm.model.results import Timeline
from pytest_fcvm.model.specs import VmSpec
from pytest_fcvm.network.ports.open import open_ports

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `fakes`

from fakes.agent import FakeAgent
from fakes.vm import FakeEngine, Service

_OURS = ("fcvm-session", "fake-agent", "fcvm-relay", "fcvm-client-path")


def _no_snapshot(_running: RunningVm, _name: str) -> Snapshot:
    raise AssertionError("no test here takes a snapshot")


_FILES = SnapshotFiles(memory=Path("/memory"), state=Path("/state"), rootfs=Path("/rootfs"))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is closed after the test; then no thread of a clone lives."""
    with ExitStack() as stack:
        yield stack
    left = lambda: [thread.name for thread in threading.enumerate() if thread.name in _OURS]  # noqa: E731
    assert wait_until(lambda: not left(), Deadline(10)), left()


@pytest.fixture
def engine(stack: ExitStack, tmp_path: Path) -> FakeEngine:
    """An engine of fake VMs."""
    return FakeEngine(tmp_path / "run", lambda: stack.enter_context(FakeAgent()))


@pytest.fixture
def service(stack: ExitStack) -> Service:
    """A web server that plays guest port 80."""
    service = Service()
    stack.callback(service.close)
    return service


@pytest.fixture
def root(tmp_path: Path, engine: FakeEngine, service: Service) -> Path:
    """The file system of every guest."""
    path = tmp_path / "guest"
    path.mkdir()

    def prepare(agent: FakeAgent) -> None:
        agent.root, agent.ports[80], agent.listening[80] = path, service.address, 1

    engine.prepare_guest = prepare
    return path


@pytest.fixture
def make_clone(stack: ExitStack, engine: FakeEngine, root: Path, tmp_path: Path) -> Callable[..., Clone]:
    """Start a clone; keyword arguments are fields of its spec, and the exit code that its workload may have."""
    before = tmp_path / "base.log"
    before.write_bytes(b"printed by the base\n")

    def start(expected_exit_code: int | None, ports: tuple[PublishedPort, ...]) -> RunningVm:
        vm = engine.prepare(RestorePlan(name="web", shape=VmShape(mem_mib=64, cpus=1), files=_FILES))
        vm.start()
        log = WorkloadLog(vm.console_path.with_name("workload.log"), before=before)
        agent = start_session(vm.channel(), PROTOCOL_BOOT_SECRET, log_sink=log.append, timeout_s=10, explain=vm.explain)
        running = RunningVm(vm, agent, log, Timeline(monotonic()), expected_exit_code=expected_exit_code)
        open_ports(running, ports)
        return running

    def make(*, expected_exit_code: int | None = None, **fields: object) -> Clone:
        defaults = ExecDefaults(env={"PATH": "/bin", "LEVEL": "image"}, cwd="/srv", user="www")
        clone = Clone(
            name="web",
            spec=VmSpec().merged(fields),
            engine="fake",
            defaults=defaults,
            start=partial(start, expected_exit_code),
            take_snapshot=_no_snapshot,
        )
        stack.callback(clone.close)
        return clone

    return make


@pytest.fixture
def clone(make_clone: Callable[..., Clone]) -> Clone:
    """A running clone."""
    return make_clone()


@pytest.fixture
def guest(clone: Clone, engine: FakeEngine) -> FakeAgent:
    """The agent of the running clone."""
    return engine.vms[-1].agent
