"""Rewinding: the next clone takes over the VM of an ended one, and nothing of that clone but the process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fakes.vm import FakeEngine, RewindableVm

from pytest_fcvm.clone import Clone
from pytest_fcvm.engine.protocol import RestorePlan
from pytest_fcvm.errors import EngineError, GuestError
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.host.admission.admission import NoRoomToPrewarm
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.snapshot import OpenSnapshot, SnapshotInputs, SnapshotRuntime


class Rooms:
    """Who has room in the host's memory: tests, and VMs that no test has asked for."""

    def __init__(self) -> None:
        self.tests = self.idle = 0
        self.has_room_for_idle, self.has_room_beside_tests = True, False

    @contextmanager
    def admit(self, _mem_mib: int) -> Iterator[None]:
        self.tests += 1
        yield
        self.tests -= 1

    @contextmanager
    def admit_idle(self, _mem_mib: int) -> Iterator[None]:
        if not self.has_room_for_idle or (self.tests and not self.has_room_beside_tests):
            raise NoRoomToPrewarm("no room")
        self.idle += 1
        yield
        self.idle -= 1


@pytest.fixture
def rooms() -> Rooms:
    """Room for any number of clones, and for an idle VM while no test has one."""
    return Rooms()


@pytest.fixture
def make_snapshot(
    make_inputs: Callable[..., SnapshotInputs],
    open_built: Callable[[SnapshotInputs, SnapshotRuntime], OpenSnapshot],
    rooms: Rooms,
    engine: FakeEngine,
) -> Callable[..., OpenSnapshot]:
    """Build a snapshot on an engine that rewinds; keyword arguments are fields of the runtime."""
    engine.rewinds = True
    return lambda **fields: open_built(
        make_inputs(), SnapshotRuntime(admit=rooms.admit, admit_prewarmed=rooms.admit_idle, **fields)
    )


@pytest.fixture
def snapshot(make_snapshot: Callable[..., OpenSnapshot]) -> OpenSnapshot:
    """A snapshot whose clones can be rewound."""
    return make_snapshot()


def _vm(clone: Clone) -> RewindableVm:
    vm = clone.running.vm
    assert isinstance(vm, RewindableVm)
    return vm


def _entropy(vm: RewindableVm) -> Any:
    sent = [fields for kind, fields in vm.agent.executed if kind is StreamKind.PERSONALISE]
    return next(fields[FieldTag.ENTROPY] for fields in sent if FieldTag.ENTROPY in fields)


def test_the_next_clone_takes_over_the_vm_and_is_another_clone(snapshot: OpenSnapshot, rooms: Rooms) -> None:
    with snapshot.clone() as first:
        pass
    assert _vm(first).calls == ["start", "halt"]
    assert _vm(first).exit is None
    assert (rooms.tests, rooms.idle) == (0, 1)
    with snapshot.clone() as second:
        assert _vm(first).calls == ["start", "halt", "rewind"]
        assert [phase for phase, _ in second.timeline.phases] == ["rewind", "agent", "ready"]
        assert second.http(80).get("/").text == "hello"
        assert (rooms.tests, rooms.idle) == (1, 0)
        assert second.name != first.name
        assert _entropy(_vm(second)) != _entropy(_vm(first))
        assert snapshot.rewound == 1
        with pytest.raises(GuestError, match="is closed"):
            first.exec("true")


def test_an_idle_vm_ends_with_its_snapshot(snapshot: OpenSnapshot, rooms: Rooms) -> None:
    with snapshot.clone() as clone:
        pass
    snapshot.close()
    assert _vm(clone).exit is not None
    assert rooms.idle == 0


def test_a_clone_that_outlives_its_snapshot_is_killed(snapshot: OpenSnapshot, rooms: Rooms) -> None:
    with snapshot.clone() as clone:
        snapshot.close()
    assert _vm(clone).exit is not None
    assert (rooms.tests, rooms.idle) == (0, 0)


def test_a_test_that_needs_the_room_of_an_idle_vm_gets_it(snapshot: OpenSnapshot, rooms: Rooms) -> None:
    with snapshot.clone() as clone:
        pass
    snapshot.release()
    assert _vm(clone).exit is not None
    assert rooms.idle == 0
    with snapshot.clone() as second:
        assert [phase for phase, _ in second.timeline.phases] == ["spawn", "agent", "ready"]


def test_a_vm_is_killed_where_there_is_no_room_to_keep_it(snapshot: OpenSnapshot, rooms: Rooms) -> None:
    rooms.has_room_for_idle = False
    with snapshot.clone() as clone:
        pass
    assert _vm(clone).exit is not None
    assert rooms.tests == 0


def test_a_vm_that_cannot_be_rewound_gives_way_to_a_new_one(snapshot: OpenSnapshot, rooms: Rooms) -> None:
    with snapshot.clone() as first:
        _vm(first).refusal = EngineError("QEMU refused x-fcvm-rewind")
    with snapshot.clone() as second:
        assert _vm(first).exit is not None
        assert [phase for phase, _ in second.timeline.phases] == ["spawn", "agent", "ready"]
        assert (snapshot.rewound, snapshot.rewinds_failed) == (0, 1)
        assert (rooms.tests, rooms.idle) == (1, 0)


@pytest.mark.parametrize("ruin", ["kill", "die", "save"])
def test_a_vm_in_doubt_is_not_kept(snapshot: OpenSnapshot, ruin: str) -> None:
    with snapshot.clone() as clone:
        if ruin == "kill":
            clone.kill()
        elif ruin == "die":
            _vm(clone).die(11)
        else:
            _vm(clone).is_changed = True
    assert _vm(clone).exit is not None
    with snapshot.clone() as second:
        assert next(phase for phase, _ in second.timeline.phases) == "spawn"


def test_rewinding_can_be_turned_off(make_snapshot: Callable[..., OpenSnapshot]) -> None:
    with make_snapshot(rewinds=False).clone() as clone:
        pass
    assert _vm(clone).exit is not None
    assert _vm(clone).calls == ["start"]


def test_a_reset_rewinds_the_clones_own_vm(snapshot: OpenSnapshot) -> None:
    with snapshot.clone() as clone:
        before, port = _vm(clone), clone.port(80)
        clone.reset()
        assert before.calls[-1] == "rewind"
        assert clone.port(80) == port
        assert clone.http(80).get("/").text == "hello"


def test_a_prewarmed_clone_takes_over_an_idle_vm(
    make_snapshot: Callable[..., OpenSnapshot], engine: FakeEngine
) -> None:
    snapshot = make_snapshot(pool_size=1)
    assert snapshot.pool
    for _ in range(4):
        with snapshot.clone():
            pass
    plans = [vm for vm in engine.vms if isinstance(vm.plan, RestorePlan) and "start" in vm.calls]
    assert snapshot.rewound >= 1
    assert len(plans) >= 4


def test_the_workload_of_a_rewound_clone_waits_frozen_for_its_test(
    make_snapshot: Callable[..., OpenSnapshot], rooms: Rooms
) -> None:
    rooms.has_room_beside_tests = True
    snapshot = make_snapshot(pool_size=1)
    assert snapshot.pool
    for _ in range(3):
        with snapshot.clone() as clone:
            assert wait_until(lambda: snapshot.pool.ready, Deadline(10))  # type: ignore[union-attr]
            assert not clone.running.is_frozen
    assert snapshot.pool.ready[0].running.is_frozen
    kinds = [kind for kind, _ in _vm(clone).agent.executed]
    assert StreamKind.FREEZE not in kinds
    assert kinds.count(StreamKind.PERSONALISE) == 3  # identity; then, in the test, an answer and the time of day
