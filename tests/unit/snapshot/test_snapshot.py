"""The warm path: clones of a snapshot, each a VM of its own, and nothing left of one that did not start."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from fakes.agent import FakeAgent
from fakes.vm import FakeEngine, FakeVm, at_verb

from pytest_fcvm.clone import Clone
from pytest_fcvm.errors import EngineError, FcvmError, HostError, UsageProblem
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.model.net import PublishedPort
from pytest_fcvm.model.specs import Clock, VmSpec
from pytest_fcvm.snapshot import OpenSnapshot, SnapshotInputs, SnapshotRuntime


class Room:
    """The host's memory: what clones were admitted and not given back."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.full = False
        self.on_created: list[Clone] = []
        self.failed: list[FcvmError] = []

    @contextmanager
    def admit(self, mem_mib: int) -> Iterator[None]:
        if self.full:
            raise HostError("no room")
        self.taken.append(mem_mib)
        try:
            yield
        finally:
            self.taken.remove(mem_mib)


@pytest.fixture
def room() -> Room:
    """Room for any number of clones."""
    return Room()


@pytest.fixture
def make_snapshot(
    make_inputs: Callable[..., SnapshotInputs],
    open_built: Callable[[SnapshotInputs, SnapshotRuntime], OpenSnapshot],
    room: Room,
) -> Callable[..., OpenSnapshot]:
    """Build a snapshot; keyword arguments are fields of its spec."""
    runtime = SnapshotRuntime(
        admit=room.admit,
        admit_prewarmed=room.admit,
        on_created=room.on_created.append,
        on_failed=lambda _spec, error: room.failed.append(error),
    )
    return lambda **fields: open_built(make_inputs(**fields), runtime)


@pytest.fixture
def snapshot(make_snapshot: Callable[..., OpenSnapshot]) -> OpenSnapshot:
    """A snapshot of the service on port 80."""
    return make_snapshot()


@pytest.fixture
def start(stack: ExitStack) -> Callable[..., Clone]:
    """Start a clone that is closed after the test."""
    return lambda snapshot, **how: stack.enter_context(snapshot.clone(**how))


def _agent_of(clone: Clone) -> FakeAgent:
    return clone.running.vm.agent  # type: ignore[attr-defined, no-any-return]


def _identity(clone: Clone) -> Any:
    """Return what made it unlike every other; the time follows by itself."""
    sent = [fields for kind, fields in _agent_of(clone).executed if kind is StreamKind.PERSONALISE]
    (fields,) = [fields for fields in sent if FieldTag.ENTROPY in fields]
    return fields


def test_a_clone_runs_answers_and_knows_where_it_comes_from(
    snapshot: OpenSnapshot, start: Callable[..., Clone], room: Room
) -> None:
    clone = start(snapshot, name="web-1")
    assert (clone.name, clone.engine, clone.spec) == ("web-1", "fake", snapshot.spec)
    assert clone.http(80).get("/").text == "hello"
    assert room.on_created == [clone]
    assert [phase for phase, _ in clone.timeline.phases] == ["spawn", "agent", "ready"]
    assert repr(snapshot) == "<Snapshot 000000000000 of registry/web:1>"


def test_the_vmm_of_the_next_clone_gets_itself_ready_meanwhile(
    snapshot: OpenSnapshot, start: Callable[..., Clone], engine: FakeEngine
) -> None:
    start(snapshot)
    assert wait_until(lambda: engine.vms[-1].calls == ["preconfigure"], Deadline(20))
    standby = engine.vms[-1]
    assert standby.name == "standby"
    clone = start(snapshot, name="web-2")
    assert clone.running.vm is standby
    assert standby.name == "web-2", "errors name the VM by its clone"


def test_every_clone_gets_random_bytes_names_and_addresses_of_its_own(
    snapshot: OpenSnapshot, start: Callable[..., Clone]
) -> None:
    clones = [start(snapshot) for _ in range(5)]
    identities = [_identity(clone) for clone in clones]
    for tag in (FieldTag.ENTROPY, FieldTag.HOSTS, FieldTag.MACHINE_ID, FieldTag.BOOT_ID, FieldTag.MAC):
        values = {bytes(fields[tag][0]) for fields in identities}
        assert len(values) == 5, tag
    first = identities[0]
    assert len(first[FieldTag.ENTROPY][0]) == 32
    assert (len(first[FieldTag.MAC][0]), bytes(first[FieldTag.MAC][0][:3])) == (6, b"\x52\x54\x00")
    assert re.fullmatch("[0-9a-f]{32}", first.text(FieldTag.MACHINE_ID))
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first.text(FieldTag.BOOT_ID))
    assert first.texts(FieldTag.HOSTS)[0] == f"10.0.2.15 {clones[0].name}"
    assert FieldTag.HOSTNAME not in first  # services remember under which they have started


def test_identity_comes_before_everything_else(snapshot: OpenSnapshot, start: Callable[..., Clone]) -> None:
    clone = start(snapshot)
    clone.succeed(["echo"])
    assert _agent_of(clone).executed[0][0] is StreamKind.PERSONALISE


def test_the_clock_is_set_when_the_guest_has_answered_and_before_the_hook(
    make_snapshot: Callable[..., OpenSnapshot], start: Callable[..., Clone], engine: FakeEngine
) -> None:
    snapshot = make_snapshot(hook="echo hook")
    answered: list[int] = []
    prepare = engine.prepare_guest

    def take_long(agent: FakeAgent) -> None:
        """Play a guest that comes to life late: what is in the channel waits for it."""
        prepare(agent)
        at_verb(agent, StreamKind.PERSONALISE, lambda: (time.sleep(0.2), answered.append(time.time_ns())))

    engine.prepare_guest = take_long
    sent = [fields for kind, fields in _agent_of(start(snapshot)).executed if kind is StreamKind.PERSONALISE]
    first, second = sent
    assert (first.number(FieldTag.FLAGS), FieldTag.REALTIME_NS in first, FieldTag.ARG in first) == (16, False, False)
    assert answered[0] <= second.number(FieldTag.REALTIME_NS) <= answered[1] - 150_000_000
    assert second.texts(FieldTag.ARG) == ["/bin/sh", "-c", "echo hook"]
    assert FieldTag.FLAGS not in second


def test_a_clone_with_the_snapshots_clock_gets_no_time(
    make_snapshot: Callable[..., OpenSnapshot], start: Callable[..., Clone]
) -> None:
    clone = start(make_snapshot(clock=Clock.SNAPSHOT))
    (identity,) = [fields for kind, fields in _agent_of(clone).executed if kind is StreamKind.PERSONALISE]
    assert not identity.keys() & {FieldTag.REALTIME_NS, FieldTag.FLAGS}


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("registry:5000/team/My_Web.App:1.2", "my-web-app"),
        ("nginx@sha256:abc", "nginx"),
        ("oci:/var/images/web:latest", "web"),
        ("___", "clone"),
        ("x" * 200, "x" * 40),
    ],
)
def test_a_clone_is_named_after_its_image(
    image: str, name: str, make_snapshot: Callable[..., OpenSnapshot], start: Callable[..., Clone]
) -> None:
    assert re.fullmatch(f"{name}-[0-9a-f]{{8}}", start(make_snapshot(image=image)).name)


@pytest.mark.parametrize("name", ["Web", "a.b", "-a", "a-", "a" * 64, "a b", "ü"])
def test_a_name_that_is_no_host_name_is_a_usage_problem(name: str, snapshot: OpenSnapshot, engine: FakeEngine) -> None:
    before = len(engine.vms)
    with pytest.raises(UsageProblem, match="is not a host name"):
        snapshot.clone(name=name)
    assert len(engine.vms) == before


def test_a_clone_may_have_host_ports_of_its_own(snapshot: OpenSnapshot, start: Callable[..., Clone]) -> None:
    clone = start(snapshot, publish=(PublishedPort(guest_port=443, host_port=18443),))
    assert clone.endpoint(443) == ("127.0.0.1", 18443)
    assert snapshot.spec.publish == ()


def test_room_is_taken_for_a_clones_life(snapshot: OpenSnapshot, room: Room) -> None:
    with snapshot.clone():
        assert room.taken == [40 + 256 // 8]
        with snapshot.clone():
            assert len(room.taken) == 2
    assert room.taken == []


def test_without_room_no_clone_is_started_and_the_reason_is_reported(
    snapshot: OpenSnapshot, room: Room, engine: FakeEngine
) -> None:
    room.full = True
    before = len(engine.vms)
    with pytest.raises(HostError, match="no room"):
        snapshot.clone()
    assert len(engine.vms) == before
    assert [error.message for error in room.failed] == ["no room"]


def test_a_clone_that_dies_before_it_answers_leaves_nothing_and_says_why(
    snapshot: OpenSnapshot, room: Room, engine: FakeEngine
) -> None:
    def die(vm: FakeVm) -> None:
        vm.vmm_log_path.write_text("qemu: cannot load the state\n")
        vm.die(6)

    engine.change_vm = die
    with pytest.raises(EngineError) as caught:
        snapshot.clone(name="web")
    assert caught.value.message.endswith("ended: signal 6")
    assert caught.value.evidence["VMM log"] == "qemu: cannot load the state"
    assert (room.taken, room.failed) == ([], [caught.value])
    assert all(vm.exit is not None for vm in engine.vms)


def test_a_clone_that_cannot_be_given_an_identity_holds_no_channel(
    snapshot: OpenSnapshot, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels: list[FakeVm] = []
    channel = FakeVm.channel
    monkeypatch.setattr(FakeVm, "channel", lambda vm: channels.append(vm) or channel(vm))

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("pytest_fcvm.snapshot.cloner.fresh_identity", refuse)
    with pytest.raises(HostError, match="no file descriptor is left for web-1"):
        snapshot.clone(name="web-1")
    assert not channels
    assert engine.vms[-1].exit is not None


def test_a_reset_clone_has_a_new_identity(snapshot: OpenSnapshot, start: Callable[..., Clone], room: Room) -> None:
    clone = start(snapshot)
    before = (clone.endpoint(80), _identity(clone))
    clone.reset()
    assert clone.endpoint(80) == before[0]
    assert _identity(clone).text(FieldTag.MAC) != before[1].text(FieldTag.MAC)
    assert f"10.0.2.15 {clone.name}" in _identity(clone).texts(FieldTag.HOSTS)
    assert len(room.taken) == 1


def test_the_log_of_the_base_is_there_before_any_clone(
    make_snapshot: Callable[..., OpenSnapshot], start: Callable[..., Clone], engine: FakeEngine
) -> None:
    serve = engine.prepare_guest
    engine.prepare_guest = lambda agent: (serve(agent), agent.log(b"listening\n"))[0]
    snapshot = make_snapshot()
    engine.prepare_guest = serve
    assert wait_until(lambda: snapshot.logs() == "listening\n", Deadline(10))
    assert start(snapshot).logs() == "listening\n"


def test_closing_a_snapshot_ends_what_was_kept_ready_and_no_clone(
    snapshot: OpenSnapshot, start: Callable[..., Clone], engine: FakeEngine
) -> None:
    clone = start(snapshot)
    snapshot.close()
    alive = lambda: [vm for vm in engine.vms if vm.exit is None]  # noqa: E731
    assert wait_until(lambda: alive() == [clone.running.vm], Deadline(10))
    assert clone.succeed(["echo", "x"]) == "x\n"


def test_no_value_of_an_environment_is_in_a_snapshots_facts(make_snapshot: Callable[..., OpenSnapshot]) -> None:
    snapshot = make_snapshot(env={"PASSWORD": "tiger-lily"})
    assert "tiger" not in str(snapshot.facts)
    assert isinstance(snapshot.spec, VmSpec)
