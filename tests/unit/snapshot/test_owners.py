"""Whatever fails at whatever step, nothing is left: each kind of call of a run is made to fail in turn."""

from __future__ import annotations

import gc
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes.vm import FakeEngine, FakeVm, RewindableVm

import pytest_fcvm.network.ports.open
import pytest_fcvm.snapshot.builder
import pytest_fcvm.snapshot.cloner
from pytest_fcvm.clone.log import WorkloadLog
from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.errors import EngineError, FcvmError
from pytest_fcvm.guest.agent import Agent
from pytest_fcvm.guest.session import Session
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.network.ports.relay import Relay
from pytest_fcvm.ready import ClientPath
from pytest_fcvm.snapshot import OpenSnapshot, SnapshotInputs, SnapshotRuntime, build_snapshot
from pytest_fcvm.snapshot.cloner import Cloner
from pytest_fcvm.snapshot.idle import IdleVms
from pytest_fcvm.store import Entry

# What boots, restores, personalises, fills the pool and hands out; closing is what must work afterwards.
_STEPS: tuple[tuple[Any, str], ...] = (
    *((FakeEngine, name) for name in ("boot", "prepare")),
    *((FakeVm, name) for name in ("channel", "start", "pause", "resume", "snapshot")),
    *((Agent, name) for name in ("configure", "start", "metrics", "sync", "quiesce", "freeze", "personalise")),
    *((Session, name) for name in ("__init__", "start", "open")),
    (WorkloadLog, "__init__"),
    (RunningVm, "pause_for_exit"),
    (Relay, "publish"),
    (ClientPath, "verify"),
    (Cloner, "_warm_up"),
    *((RewindableVm, name) for name in ("halt", "rewind")),
    *((IdleVms, name) for name in ("keep", "take", "rewind")),
    (pytest_fcvm.network.ports.open, "ReversePorts"),
    (pytest_fcvm.snapshot.cloner, "fresh_identity"),
    (pytest_fcvm.snapshot.builder, "base_config"),
)
_FAULTS = (EngineError("injected"), OSError(5, "injected", "/injected"), KeyboardInterrupt("injected"))


class _Injector:
    """Counts the calls of the steps, and raises in the one that is named by its number."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._lock = threading.Lock()
        self._at, self._fault = -1, BaseException()
        self.calls: list[str] = []
        self.channels: list[socket.socket] = []
        for owner, name in _STEPS:
            patch.setattr(owner, name, self._wrap(f"{owner.__name__}.{name}", getattr(owner, name)))

    def arm(self, at: int, fault: BaseException) -> None:
        self.calls, self._at, self._fault = [], at, fault

    def _wrap(self, title: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                number = len(self.calls)
                self.calls.append(title)
            if number == self._at:
                raise self._fault.with_traceback(None)
            result = function(*arguments, **named)
            if isinstance(result, socket.socket):
                self.channels.append(result)
            return result

        return call


@contextmanager
def _nothing_left(engine: FakeEngine, injector: _Injector, what: str) -> Iterator[None]:
    """Check that the block leaves no thread of ours, no VM that runs, and no channel, file or listener open."""
    gc.collect()
    first = len(engine.vms)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        yield
        ours = lambda: [t.name for t in threading.enumerate() if t.name.startswith("fcvm")]  # noqa: E731
        assert wait_until(lambda: not ours(), Deadline(10)), (what, ours())
        gc.collect()
    unclosed = [str(w.message) for w in seen if "unclosed" in str(w.message) and "family=1," not in str(w.message)]
    assert all(channel.fileno() < 0 for channel in injector.channels), what  # family 1: those of the fake agent
    assert not unclosed, (what, unclosed)
    alive = [vm.name for vm in engine.vms[first:] if vm.exit is None]
    assert not alive, (what, alive)


def _life(inputs: SnapshotInputs, directory: Path) -> None:
    """Build a snapshot, take clones, some of them prewarmed or in VMs of those before, and close everything."""
    directory.mkdir()
    facts = build_snapshot(inputs, directory, lambda _phase: None)
    room: Any = lambda _mem_mib: ExitStack()  # noqa: E731
    runtime = SnapshotRuntime(admit=room, admit_prewarmed=room, pool_size=1)
    with OpenSnapshot(
        entry=Entry(path=directory, key="0" * 64, facts=facts), inputs=inputs, runtime=runtime
    ) as snapshot:
        for _ in range(3):
            with snapshot.clone():
                assert snapshot.pool is not None
                wait_until(lambda: not snapshot.pool.making, Deadline(10))  # type: ignore[union-attr]


@pytest.fixture
def injector(monkeypatch: pytest.MonkeyPatch) -> _Injector:
    for name in ("_SETTLE_S", "_QUIET_S"):
        monkeypatch.setattr(pytest_fcvm.snapshot.builder, name, 0.01)
    return _Injector(monkeypatch)


@pytest.mark.parametrize("rewinds", [False, True], ids=["kills", "rewinds"])
@pytest.mark.parametrize("fault", _FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # an interrupt in a maker's thread
def test_a_fault_at_any_step_leaves_nothing(
    injector: _Injector,
    make_inputs: Callable[..., SnapshotInputs],
    engine: FakeEngine,
    tmp_path: Path,
    fault: BaseException,
    rewinds: bool,
) -> None:
    engine.rewinds = rewinds
    with _nothing_left(engine, injector, "no fault"):
        _life(make_inputs(), tmp_path / "whole")
    steps = list(injector.calls)
    assert len(steps) > 30, steps
    for number, step in sorted((steps.index(step), step) for step in set(steps)):
        injector.arm(number, fault)
        with _nothing_left(engine, injector, f"{fault!r} in call {number}: {step}"):
            try:
                _life(make_inputs(), tmp_path / str(number))
            except FcvmError:
                pass
            except (KeyboardInterrupt, RuntimeError) as error:
                assert "injected" in str(error)  # noqa: PT017 - an interrupt goes through, an OSError becomes ours


@pytest.mark.parametrize("step", ["restore", "ready"])
def test_the_end_of_the_session_ends_a_clone_that_is_being_prewarmed(
    make_inputs: Callable[..., SnapshotInputs],
    engine: FakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    reached, held = threading.Event(), threading.Event()
    owner, name = {"restore": (FakeEngine, "prepare"), "ready": (Cloner, "_warm_up")}[step]
    original = getattr(owner, name)

    def slow(*arguments: Any) -> Any:
        if threading.current_thread().name in ("fcvm-pool", "fcvm-standby"):  # the standby may be the first
            reached.set()
            held.wait(0.3)
        return original(*arguments)

    inputs, directory = make_inputs(), tmp_path / "entry"
    directory.mkdir()
    facts = build_snapshot(inputs, directory, lambda _phase: None)
    monkeypatch.setattr(owner, name, slow)
    room: Any = lambda _mem_mib: ExitStack()  # noqa: E731
    snapshot = OpenSnapshot(
        entry=Entry(path=directory, key="0" * 64, facts=facts),
        inputs=inputs,
        runtime=SnapshotRuntime(admit=room, admit_prewarmed=room, pool_size=1),
    )
    clone = snapshot.clone()
    assert reached.wait(10)
    clone.close()
    snapshot.close()
    left = [thread.name for thread in threading.enumerate() if thread.name in ("fcvm-pool", "fcvm-standby")]
    assert not left  # not a moment later: what they need goes next
    assert snapshot.fault is None
    assert all(vm.exit is not None for vm in engine.vms)
