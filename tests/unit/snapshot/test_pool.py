"""The pool: clones that run before a test asks for them, are paused until then, and are replaced when they die."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes.vm import FakeEngine, FakeVm

from pytest_fcvm.clone import Clone
from pytest_fcvm.engine.protocol import RestorePlan
from pytest_fcvm.errors import EngineError
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.host.admission.admission import NoRoomToPrewarm
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.image.config import Healthcheck, ImageConfig
from pytest_fcvm.model.net import PublishedPort
from pytest_fcvm.model.specs import ReadyMode, ReadySpec
from pytest_fcvm.snapshot import OpenSnapshot, SnapshotInputs, SnapshotRuntime, build_snapshot
from pytest_fcvm.snapshot.pool import Depth
from pytest_fcvm.store import Entry

_CHECKED = ImageConfig(entrypoint=("/entry",), healthcheck=Healthcheck(test=("CMD", "echo", "warm")))


class Room:
    """The host's memory: how many clones of tests and how many prewarmed ones were admitted."""

    def __init__(self) -> None:
        self.asked = self.prewarmed = 0
        self.full_for_prewarmed = False

    @contextmanager
    def admit(self, _mem_mib: int) -> Iterator[None]:
        self.asked += 1
        yield
        self.asked -= 1

    @contextmanager
    def admit_prewarmed(self, _mem_mib: int) -> Iterator[None]:
        if self.full_for_prewarmed:
            raise NoRoomToPrewarm("no room to prewarm")
        self.prewarmed += 1
        yield
        self.prewarmed -= 1


@pytest.fixture
def room() -> Room:
    """Room for any number of clones."""
    return Room()


@pytest.fixture
def make_snapshot(
    make_inputs: Callable[..., SnapshotInputs], tmp_path: Path, stack: ExitStack, room: Room
) -> Callable[..., OpenSnapshot]:
    """Build a snapshot with a pool of `pool_size` clones; other arguments are fields of its spec."""

    def make(pool_size: int | None = 1, makers: int = 1, **fields: Any) -> OpenSnapshot:
        inputs = make_inputs(**fields)
        directory = tmp_path / "entry"
        directory.mkdir()
        facts = build_snapshot(inputs, directory, lambda _phase: None)
        runtime = SnapshotRuntime(
            admit=room.admit, admit_prewarmed=room.admit_prewarmed, pool_size=pool_size, makers=makers
        )
        snapshot = OpenSnapshot(entry=Entry(path=directory, key="0" * 64, facts=facts), inputs=inputs, runtime=runtime)
        stack.callback(_wait_for_maker)  # before the service goes that it may still be proving
        stack.callback(snapshot.close)
        return snapshot

    return make


@pytest.fixture
def clones_of(engine: FakeEngine) -> Callable[[], list[FakeVm]]:
    """Return the VMs of clones that live and were started, spares left out."""
    return lambda: [
        vm for vm in engine.vms if isinstance(vm.plan, RestorePlan) and vm.exit is None and "start" in vm.calls
    ]


def _wait_for_maker() -> None:
    assert wait_until(lambda: "fcvm-pool" not in [thread.name for thread in threading.enumerate()], Deadline(30))


def _vm(clone: Clone) -> FakeVm:
    return clone.running.vm  # type: ignore[return-value]


def _sleeps(vm: FakeVm) -> bool:
    return vm.calls[-1] == "pause" and vm.agent.executed[-1][0] is StreamKind.FREEZE


def _wait_for_a_paused_one(clones_of: Callable[[], list[FakeVm]], beside: int = 1) -> FakeVm:
    assert wait_until(lambda: len(clones_of()) == beside + 1 and _sleeps(clones_of()[-1]), Deadline(10))
    return clones_of()[-1]


def test_the_next_clone_is_made_while_a_test_has_its_own(
    make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]], room: Room
) -> None:
    snapshot = make_snapshot()
    with snapshot.clone() as first:
        prewarmed = _wait_for_a_paused_one(clones_of)
        assert (room.asked, room.prewarmed) == (1, 1)
        with snapshot.clone() as second:
            assert _vm(second) is prewarmed
            assert [phase for phase, _ in second.timeline.phases] == ["pool", "resume"]
            assert second.http(80).get("/").text == "hello"
            assert second.name != first.name
            assert f"10.0.2.15 {second.name}" in prewarmed.agent.executed[0][1].texts(FieldTag.HOSTS)
    snapshot.close()
    assert wait_until(lambda: not clones_of(), Deadline(10))
    assert wait_until(lambda: (room.asked, room.prewarmed) == (0, 0), Deadline(10))


def test_a_prewarmed_clone_has_its_identity_at_once_and_the_time_when_it_is_taken(
    make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]]
) -> None:
    snapshot = make_snapshot()
    with snapshot.clone():
        prewarmed = _wait_for_a_paused_one(clones_of)
        done = [kind for kind, _ in prewarmed.agent.executed]
        assert done[0] is StreamKind.PERSONALISE
        assert done[-1] is StreamKind.FREEZE
        asked = real_time_ns()
        with snapshot.clone():
            kind, fields = prewarmed.agent.executed[-1]
            assert kind is StreamKind.PERSONALISE
            assert fields.number(FieldTag.REALTIME_NS) >= asked - 10_000_000
            assert FieldTag.ENTROPY not in fields, "its random bytes are its own already"
            assert prewarmed.calls[-1] == "resume"


def test_a_prewarmed_clone_is_verified_by_the_condition_of_its_base(
    make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]]
) -> None:
    snapshot = make_snapshot(ready=ReadySpec(mode=ReadyMode.HEALTHCHECK), image_config=_CHECKED)
    with snapshot.clone():
        prewarmed = _wait_for_a_paused_one(clones_of)
        commands = [fields.texts(FieldTag.ARG) for kind, fields in prewarmed.agent.executed if kind is StreamKind.EXEC]
        assert commands == [["echo", "warm"]]


def test_warm_runs_in_prewarmed_clones_alone(
    make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]]
) -> None:
    warmed: list[str] = []
    snapshot = make_snapshot(warm=lambda clone: warmed.append(clone.succeed(["echo", "warm"])))
    with snapshot.clone() as first:
        prewarmed = _wait_for_a_paused_one(clones_of)
        assert warmed == ["warm\n"]
        ran = [fields.texts(FieldTag.ARG) for kind, fields in prewarmed.agent.executed if kind is StreamKind.EXEC]
        assert ran == [["echo", "warm"]]
        assert StreamKind.EXEC not in [kind for kind, _ in _vm(first).agent.executed]


def test_a_warm_function_that_fails_is_reported_and_fails_no_test(
    make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]]
) -> None:
    def fail(_clone: Clone) -> None:
        raise ValueError("no such table")

    snapshot = make_snapshot(warm=fail)
    with snapshot.clone():
        assert wait_until(lambda: snapshot.fault is not None, Deadline(10))
        assert str(snapshot.fault).startswith("the warm function fail failed: ValueError: no such table")
        with snapshot.clone() as second:
            assert second.succeed(["echo", "x"]) == "x\n"


def test_several_are_made_at_once_where_there_are_processors_for_it(
    make_snapshot: Callable[..., OpenSnapshot], engine: FakeEngine
) -> None:
    snapshot = make_snapshot(pool_size=3, makers=2)
    held, resume_session = threading.Semaphore(0), threading.Event()

    def hold(_vm: FakeVm) -> None:
        if threading.current_thread().name == "fcvm-standby":
            raise EngineError("without a standby the pool makes the VMM of a clone")
        if threading.current_thread().name == "fcvm-pool":
            held.release()
            resume_session.wait(10)

    engine.change_vm = hold
    with snapshot.clone():
        assert held.acquire(timeout=10)
        assert held.acquire(timeout=10), "a second one is made beside the first"
        assert not held.acquire(timeout=0.2), "and no third"
        resume_session.set()


def test_one_that_died_in_the_pool_is_replaced_without_a_word(
    make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]]
) -> None:
    snapshot = make_snapshot()
    with snapshot.clone():
        _wait_for_a_paused_one(clones_of).die(11)
        with snapshot.clone() as second:
            assert second.succeed(["echo", "alive"]) == "alive\n"
        assert snapshot.lost == 1


def test_one_that_does_not_resume_is_replaced_silently(
    make_snapshot: Callable[..., OpenSnapshot],
    clones_of: Callable[[], list[FakeVm]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    snapshot = make_snapshot()
    with snapshot.clone():
        prewarmed = _wait_for_a_paused_one(clones_of)
        monkeypatch.setattr(prewarmed, "resume", lambda: (_ for _ in ()).throw(EngineError("it is gone")))
        with snapshot.clone() as second:
            assert _vm(second) is not prewarmed
            assert snapshot.lost == 1
            assert prewarmed.exit is not None


def test_a_test_that_waits_gets_the_clone_that_is_being_made_before_it_is_put_to_sleep(
    make_snapshot: Callable[..., OpenSnapshot], engine: FakeEngine, clones_of: Callable[[], list[FakeVm]]
) -> None:
    snapshot = make_snapshot()
    resume_session = threading.Event()
    with snapshot.clone() as first:
        _wait_for_a_paused_one(clones_of)
        engine.change_vm = lambda _vm: resume_session.wait(10) and None
        with snapshot.clone():  # takes the paused one; the next one is held up
            assert wait_until(lambda: any(t.name == "fcvm-pool" for t in threading.enumerate()), Deadline(10))
            threading.Timer(0.1, resume_session.set).start()
            with snapshot.clone() as third:
                assert third.name != first.name
                done = [kind for kind, _ in _vm(third).agent.executed]
                assert StreamKind.FREEZE not in done


@pytest.mark.parametrize("how", [{"name": "db"}, {"publish": (PublishedPort(guest_port=443, host_port=18444),)}])
def test_a_clone_with_its_own_settings_does_not_come_from_the_pool(
    how: dict[str, Any], make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]]
) -> None:
    snapshot = make_snapshot()
    with snapshot.clone():
        prewarmed = _wait_for_a_paused_one(clones_of)
        with snapshot.clone(**how) as second:
            assert _vm(second) is not prewarmed
            assert second.name == how.get("name", second.name)


@pytest.mark.parametrize("without", [{"pool_size": 0}, {"publish": (PublishedPort(guest_port=443, host_port=18445),)}])
def test_nothing_is_prewarmed_without_a_pool_or_with_a_fixed_port(
    without: dict[str, Any], make_snapshot: Callable[..., OpenSnapshot], room: Room
) -> None:
    snapshot = make_snapshot(**without)
    with snapshot.clone():
        assert [thread for thread in threading.enumerate() if thread.name == "fcvm-pool"] == []
        assert room.prewarmed == 0


def test_without_room_to_prewarm_tests_start_clones(make_snapshot: Callable[..., OpenSnapshot], room: Room) -> None:
    room.full_for_prewarmed = True
    snapshot = make_snapshot()
    with snapshot.clone(), snapshot.clone() as second:
        assert [phase for phase, _ in second.timeline.phases] == ["spawn", "agent", "ready"]
        assert room.asked == 2


def test_a_test_that_needs_room_gets_that_of_the_pool(
    make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]], room: Room
) -> None:
    snapshot = make_snapshot()
    with snapshot.clone() as clone:
        _wait_for_a_paused_one(clones_of)
        snapshot.release()
        assert clones_of() == [_vm(clone)]
        assert room.prewarmed == 0
        with snapshot.clone() as second:
            assert second.succeed(["echo", "x"]) == "x\n"


def test_a_reset_clone_keeps_its_ports_and_takes_nothing_from_the_pool(
    make_snapshot: Callable[..., OpenSnapshot], clones_of: Callable[[], list[FakeVm]]
) -> None:
    snapshot = make_snapshot()
    with snapshot.clone():
        prewarmed = _wait_for_a_paused_one(clones_of)
        with snapshot.clone() as second:
            assert _vm(second) is prewarmed
            before = second.endpoint(80)
            second.reset()
            assert (second.endpoint(80), _vm(second) is prewarmed) == (before, False)


def test_the_depth_follows_bursts_up_and_idleness_down() -> None:
    depth = Depth()
    assert depth.wanted == 1
    for _ in range(10):
        depth.note_take(waited=True, left=0)
    assert depth.wanted == 4
    for _ in range(16):
        depth.note_take(waited=False, left=1)
    assert depth.wanted == 3
    for _ in range(100):
        depth.note_take(waited=False, left=1)
    assert depth.wanted == 1


def test_a_fixed_depth_stays() -> None:
    depth = Depth(2)
    depth.note_take(waited=True, left=0)
    assert depth.wanted == 2
