"""Clones on private networks: who they are there is set before their workload goes on, and taken back with them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from fakes.agent import FakeAgent
from fakes.vm import FakeEngine

from pytest_fcvm.clone import Clone
from pytest_fcvm.errors import FcvmError, UsageProblem
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.model.net import Attachment
from pytest_fcvm.snapshot import OpenSnapshot, SnapshotInputs, SnapshotRuntime, build_snapshot
from pytest_fcvm.store import Entry


class Segment:
    """A private network that only keeps what happens to it."""

    def __init__(self, number: int) -> None:
        self.number, self.happened = number, []  # type: tuple[int, list[str]]
        self.ends: list[socket.socket] = []
        self.tell: Callable[[tuple[str, ...]], object] = lambda _lines: None
        self.set_link: Callable[[bool], object] = lambda _up: None

    def plug(self, name: str, _packet_socket: int | None = None) -> Attachment:
        self.happened.append(f"plug {name}")
        end, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        other.close()
        self.ends.append(end)
        address = f"10.77.{self.number}.10"
        return Attachment(
            packet_socket=end, mac="02:fc:00:00:00:01", addresses=(f"{address}/24",), hosts=(f"{address} {name}",)
        )

    def joined(self, name: str, tell: Callable[[tuple[str, ...]], object], set_link: Callable[[bool], object]) -> None:
        self.happened.append(f"joined {name}")
        self.tell, self.set_link = tell, set_link

    def unplug(self, name: str) -> None:
        self.happened.append(f"unplug {name}")


@pytest.fixture
def snapshot(make_inputs: Callable[..., SnapshotInputs], tmp_path: Path, stack: ExitStack) -> OpenSnapshot:
    inputs = make_inputs()
    directory = tmp_path / "entry"
    directory.mkdir()
    room = lambda _mib: ExitStack()  # noqa: E731
    entry = Entry(path=directory, key="0" * 64, facts=build_snapshot(inputs, directory, lambda _phase: None))
    snapshot = OpenSnapshot(entry=entry, inputs=inputs, runtime=SnapshotRuntime(admit=room, admit_prewarmed=room))
    stack.callback(snapshot.close)
    return snapshot


def _agent_of(clone: Clone) -> FakeAgent:
    return clone.running.vm.agent  # type: ignore[attr-defined, no-any-return]


def test_a_clone_joins_before_it_goes_on_and_leaves_with_its_end(snapshot: OpenSnapshot) -> None:
    inner, outer = Segment(1), Segment(2)
    with snapshot.clone(name="web", networks=[inner, outer]) as clone:
        done = [(kind, fields) for kind, fields in _agent_of(clone).executed if kind.is_verb]
        kinds = [kind for kind, _ in done]
        assert kinds[:3] == [StreamKind.JOIN, StreamKind.JOIN, StreamKind.PERSONALISE]
        assert [fields.text(FieldTag.INTERFACE) for _, fields in done[:2]] == ["eth1", "eth2"]
        assert done[2][1].texts(FieldTag.HOSTS)[-2:] == ["10.77.1.10 web", "10.77.2.10 web"]
        assert inner.happened == ["plug web", "joined web"]
        assert all(end.fileno() == -1 for end in (*inner.ends, *outer.ends))  # the VMM has its own
    assert inner.happened == outer.happened == ["plug web", "joined web", "unplug web"]


def test_the_names_of_both_networks_are_written_together(snapshot: OpenSnapshot) -> None:
    inner, outer = Segment(1), Segment(2)
    with snapshot.clone(name="web", networks=[inner, outer]) as clone:
        outer.tell(("10.77.2.10 web", "10.77.2.11 db"))
        fields = [fields for kind, fields in _agent_of(clone).executed if kind is StreamKind.JOIN][-1]
        assert fields.texts(FieldTag.HOSTS)[-3:] == ["10.77.1.10 web", "10.77.2.10 web", "10.77.2.11 db"]


def test_a_network_sets_the_link_of_its_own_nic_alone(snapshot: OpenSnapshot, engine: FakeEngine) -> None:
    inner, outer = Segment(1), Segment(2)
    with snapshot.clone(name="web", networks=[inner, outer]) as clone:
        outer.set_link(False)
        inner.set_link(True)
        (vm,) = [vm for vm in engine.vms if vm is clone.running.vm]  # not the last one: that may be the standby
        assert vm.calls[-2:] == ["link 1 down", "link 0 up"]


def test_a_clone_that_does_not_come_to_life_is_on_no_network(snapshot: OpenSnapshot, engine: FakeEngine) -> None:
    network = Segment(1)
    engine.change_vm = lambda vm: vm.die(11)
    with pytest.raises(FcvmError):
        snapshot.clone(name="web", networks=[network])
    assert network.happened == ["plug web", "unplug web"]
    assert network.ends[0].fileno() == -1


def test_more_networks_than_an_engine_has_nics_for_are_refused(snapshot: OpenSnapshot, engine: FakeEngine) -> None:
    segments = [Segment(number) for number in range(3)]
    with pytest.raises(UsageProblem, match="a clone on fake, network user, can be on 2 private networks, not 3"):
        snapshot.clone(networks=segments)
    engine.unused_nics = 0
    with pytest.raises(UsageProblem, match="can be on no private networks, not 1") as caught:
        snapshot.clone(networks=segments[:1])
    assert caught.value.hint == "use --fcvm-engine qemu"
    assert segments[0].happened == []
