"""Clones whose ports go through their agents: an engine without a network to the host, or one with that setting."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fakes.agent import FakeAgent
from fakes.vm import FakeEngine

from pytest_fcvm.clone import Clone
from pytest_fcvm.errors import GuestTimeout, HostError, UsageProblem
from pytest_fcvm.guest.frames import FieldTag, StreamKind
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.model.net import Proto, PublishedPort
from pytest_fcvm.model.specs import NetworkMode, NetworkSpec, ReadyMode, ReadySpec
from pytest_fcvm.snapshot import OpenSnapshot, SnapshotInputs, SnapshotRuntime, build_snapshot
from pytest_fcvm.store import Entry

RELAY = NetworkSpec(mode=NetworkMode.RELAY)


@pytest.fixture
def start(
    make_inputs: Callable[..., SnapshotInputs], engine: FakeEngine, tmp_path: Path, stack: ExitStack
) -> Callable[..., Clone]:
    """Build a snapshot and start a clone of it; keyword arguments are fields of the spec."""
    engine.networks = (NetworkMode.RELAY,)

    def start(**fields: Any) -> Clone:
        inputs = make_inputs(**fields)
        directory = tmp_path / "entry"
        directory.mkdir()
        facts = build_snapshot(inputs, directory, lambda _phase: None)
        room = lambda _mib: ExitStack()  # noqa: E731
        entry = Entry(path=directory, key="0" * 64, facts=facts)
        snapshot = OpenSnapshot(entry=entry, inputs=inputs, runtime=SnapshotRuntime(admit=room, admit_prewarmed=room))
        stack.callback(snapshot.close)
        return stack.enter_context(snapshot.clone())

    return start


def _agent_of(clone: Clone) -> FakeAgent:
    return clone.running.vm.agent  # type: ignore[attr-defined, no-any-return]


def _fields(agent: FakeAgent, kind: StreamKind) -> Any:
    return next(fields for executed, fields in agent.executed if executed is kind)


def test_a_request_reaches_the_service_through_the_agent(start: Callable[..., Clone]) -> None:
    clone = start()
    assert clone.http(80).get("/").text == "hello"
    assert StreamKind.CONNECT in [kind for kind, _ in _agent_of(clone).executed]


def test_the_gateways_address_stays_the_guests_own(start: Callable[..., Clone], engine: FakeEngine) -> None:
    clone = start()
    assert _fields(engine.vms[0].agent, StreamKind.QUIESCE).number(FieldTag.PEER_GATEWAY) == 1
    assert FieldTag.PEER_GATEWAY not in _fields(_agent_of(clone), StreamKind.PERSONALISE)


def test_a_published_host_port_is_there_from_the_start(start: Callable[..., Clone]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    start(publish=(PublishedPort(guest_port=80, host_port=port),))
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_a_host_port_that_is_taken_ends_the_clone(start: Callable[..., Clone], engine: FakeEngine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"cannot be published on 127.0.0.1:{port}/tcp"):
            start(publish=(PublishedPort(guest_port=80, host_port=port),))
    assert all(vm.exit is not None for vm in engine.vms)


def test_nothing_listens_any_more_when_the_clone_is_closed(start: Callable[..., Clone]) -> None:
    clone = start()
    endpoint = clone.endpoint(80)
    clone.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(endpoint, timeout=20)


def test_the_reason_of_a_reset_connection_is_in_the_error(start: Callable[..., Clone]) -> None:
    clone = start()
    assert "ports" not in clone.running.evidence()
    _agent_of(clone).refusals[StreamKind.CONNECT] = (errno.EAGAIN, "too many streams")
    with (
        pytest.raises(ConnectionResetError),  # connect says it, where the reset is as quick
        socket.create_connection(clone.endpoint(80), timeout=20) as client,
    ):
        client.recv(1)
    assert clone.running.evidence()["ports"].startswith("a connection to guest port 80 was reset: ")


def test_a_clone_that_does_not_answer_on_its_port_is_an_error(
    start: Callable[..., Clone], engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = engine.prepare_guest

    def silence_clones(agent: FakeAgent) -> None:
        prepare(agent)
        if engine.vms:
            agent.silent.add(StreamKind.CONNECT)

    engine.prepare_guest = silence_clones
    monkeypatch.setattr("pytest_fcvm.snapshot.cloner._ANSWER_S", 0.2)
    monkeypatch.setattr("pytest_fcvm.ready._TRY_S", 0.1)
    with pytest.raises(GuestTimeout, match="the clone's port does not answer"):
        start(ready=ReadySpec(mode=ReadyMode.HTTP, port=80, text="/"))


def test_an_agent_that_answers_is_proof_enough(start: Callable[..., Clone]) -> None:
    assert StreamKind.CONNECT not in [kind for kind, _ in _agent_of(start()).executed]


@pytest.mark.parametrize("networks", [(NetworkMode.RELAY,), (NetworkMode.USER,)])
def test_datagrams_go_through_the_agent_on_every_network(
    start: Callable[..., Clone], engine: FakeEngine, networks: tuple[NetworkMode, ...]
) -> None:
    engine.networks = networks
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    clone = start(publish=(PublishedPort(guest_port=53, host_port=port, proto=Proto.UDP),))
    assert clone.port(53, "udp") == port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"question", ("127.0.0.1", port))
        asked = lambda: [  # noqa: E731
            fields.text(FieldTag.PROTO) for kind, fields in _agent_of(clone).executed if kind is StreamKind.CONNECT
        ]
        assert wait_until(lambda: "udp" in asked(), Deadline(20)), asked()


def test_an_engine_that_leads_nowhere_outside_says_which_does(start: Callable[..., Clone]) -> None:
    with pytest.raises(UsageProblem, match="fake does not support the network 'auto,egress'") as caught:
        start(network=NetworkSpec(egress=True))
    assert "relay has no egress" in caught.value.hint


def test_where_both_are_offered_the_first_is_taken(make_inputs: Callable[..., SnapshotInputs]) -> None:
    assert make_inputs().network.mode is NetworkMode.USER
    assert make_inputs(network=RELAY).is_relayed
