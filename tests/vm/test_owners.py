"""Real VMs that fail, are killed or end halfway leave no process, descriptor, thread or directory."""

from __future__ import annotations

import gc
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm import FcvmError
from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.guest.agent import Agent
from pytest_fcvm.guest.session import Session
from pytest_fcvm.harness import Harness
from pytest_fcvm.hookspecs import HARNESS
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.snapshot import OpenSnapshot, copies
from pytest_fcvm.snapshot.cloner import Cloner
from tests.patience import PATIENCE

_WAIT_S = 30 * PATIENCE


@pytest.fixture
def harness(
    pytestconfig: pytest.Config, fcvm_snapshot: OpenSnapshot, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Harness]:
    """A harness of this file's own, without prewarmed clones."""
    assert fcvm_snapshot  # so that the run has a harness
    whole = pytestconfig.stash[HARNESS]
    assert isinstance(whole, Harness)
    harness = Harness(replace(whole._options, pool=0), shared_dir=tmp_path_factory.mktemp("shared"), announce=print)
    yield harness
    harness.close()


@pytest.fixture
def snapshot(harness: Harness, fcvm_snapshot: OpenSnapshot) -> OpenSnapshot:
    """The snapshot of nginx. All its clones are made on demand."""
    return harness.snapshot(fcvm_snapshot.spec, "test_owners.py")


def _left(harness: Harness) -> tuple[set[str], set[str], set[str]]:
    """Return directories of VMs, open files and threads, except those that all clones share."""
    run, own = harness.supervisor.run_dir, set()
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            target = str(path.readlink())
            if target.startswith(("socket:", "anon_inode:[eventfd]", "anon_inode:[pidfd]", str(run))):
                own.add(target)
    threads = {f"{t.name} {t.ident}" for t in threading.enumerate() if t.name.startswith("fcvm") and t.is_alive()}
    return {path.name for path in run.iterdir()}, own, {name for name in threads if not name.startswith("fcvm-exits")}


@contextmanager
def _nothing_left(harness: Harness, snapshot: OpenSnapshot) -> Iterator[None]:
    snapshot._cloner.close()  # ends the standby VMM, and lets no other follow
    before = _settled(harness)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
        assert wait_until(
            lambda: all(now <= then for now, then in zip(_left(harness), before, strict=True)), _in_time()
        ), [now - then for now, then in zip(_left(harness), before, strict=True)]
        gc.collect()
    assert [str(warning.message) for warning in seen if issubclass(warning.category, ResourceWarning)] == []


def _in_time() -> Deadline:
    return Deadline(_WAIT_S)


def _settled(harness: Harness) -> tuple[set[str], set[str], set[str]]:
    """Return what is left when the clones of earlier tests have ended."""
    gc.collect()
    seen: list[Any] = [None]

    def rests() -> bool:
        seen.append(_left(harness))
        return bool(seen[-1] == seen[-2])

    wait_until(rests, _in_time(), interval_s=0.2)
    return seen[-1]  # type: ignore[no-any-return]


def _fork(snapshot: OpenSnapshot) -> None:
    with snapshot.clone() as clone:
        clone.fork()


def _join(snapshot: OpenSnapshot, harness: Harness) -> None:
    with harness.network() as network, snapshot.clone(name="one", networks=[network]):
        pass


_CLONE_STEPS = ((Session, "start"), (Cloner, "_identity"), (RunningVm, "add_cleanup"))
_FAULTS: tuple[BaseException, ...] = (OSError(24, "Too many open files"), KeyboardInterrupt("injected"))


def _fail_at(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, deed: Callable[..., None]) -> list[int]:
    """Do something in the n-th call of a method, before its own work. Return the calls."""
    original, calls = getattr(owner, name), []  # type: ignore[var-annotated]

    def call(*arguments: Any, **named: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] == number:
            deed(*arguments)
        return original(*arguments, **named)

    patch.setattr(owner, name, call)
    return calls


def _raiser(fault: BaseException) -> Callable[..., None]:
    def fail(*_: Any) -> None:
        raise fault

    return fail


def _attempt(life: Callable[[], None]) -> None:
    with suppress(FcvmError, OSError, KeyboardInterrupt):
        life()


@pytest.mark.parametrize("fault", _FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize(("owner", "step"), _CLONE_STEPS, ids=lambda value: getattr(value, "__name__", value))
def test_a_clone_that_fails_at_a_step_leaves_nothing(
    harness: Harness, snapshot: OpenSnapshot, owner: type, step: str, fault: BaseException
) -> None:
    with _nothing_left(harness, snapshot), pytest.MonkeyPatch.context() as patch:
        calls = _fail_at(patch, owner, step, 0, _raiser(fault))
        _attempt(lambda: snapshot.clone().close())
        assert calls
    with snapshot.clone() as clone:
        clone.succeed("true")


@pytest.mark.parametrize("fault", _FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize(
    ("owner", "step", "number"), [(Agent, "suspend", 0), (copies, "snapshot_files", 0), (OpenSnapshot, "clone", 1)]
)
def test_a_fork_that_fails_at_a_step_leaves_nothing(
    harness: Harness, snapshot: OpenSnapshot, owner: type, step: str, number: int, fault: BaseException
) -> None:
    with _nothing_left(harness, snapshot), pytest.MonkeyPatch.context() as patch:
        calls = _fail_at(patch, owner, step, number, _raiser(fault))
        _attempt(lambda: _fork(snapshot))
        assert len(calls) > number


@pytest.mark.parametrize("step", ["start", "_identity", "suspend", "resume_session"])
def test_a_vmm_that_is_killed_between_two_steps_leaves_nothing(
    harness: Harness, snapshot: OpenSnapshot, step: str
) -> None:
    pids: list[int] = []

    def kill(*_: Any) -> None:
        os.kill(pids[0], signal.SIGKILL)

    owner: Any = {"start": Session, "_identity": Cloner}.get(step, Agent)
    with _nothing_left(harness, snapshot), pytest.MonkeyPatch.context() as patch:
        _fail_at(patch, Cloner, "_meet", 0, lambda _cloner, vm, *_: pids.append(vm.pid))
        calls = _fail_at(patch, owner, step, 0, kill)
        _attempt(lambda: _fork(snapshot))
        assert calls


@pytest.mark.parametrize("fault", _FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_network_whose_clone_fails_leaves_nothing(
    harness: Harness, snapshot: OpenSnapshot, fault: BaseException
) -> None:
    if not snapshot.inputs.engine.private_networks(snapshot.inputs.network.mode):
        pytest.skip("clones of this engine can join no private network")
    for owner, step in ((Session, "start"), (RunningVm, "add_cleanup")):
        with _nothing_left(harness, snapshot), pytest.MonkeyPatch.context() as patch:
            calls = _fail_at(patch, owner, step, 0, _raiser(fault))
            _attempt(lambda: _join(snapshot, harness))
            assert calls


def test_a_run_that_ends_while_clones_are_prewarmed_leaves_nothing(
    pytester: pytest.Pytester, fcvm_snapshot: OpenSnapshot
) -> None:
    pytester.makepyfile(
        """
        def test_one(fcvm_clone): pass

        def test_last(fcvm_clone, fcvm_clone_factory):
            fcvm_clone_factory()
        """
    )
    for _ in range(3):
        image = f"--fcvm-image={fcvm_snapshot.spec.image}"
        done = pytester.runpytest_subprocess(
            "-W", "error", "--fcvm-pool=2", "-p", "no:cacheprovider", "-p", "no:asyncio", image
        )
        done.assert_outcomes(passed=2)
        assert done.ret == 0
        done.stdout.no_fnmatch_line("*Warning*")
