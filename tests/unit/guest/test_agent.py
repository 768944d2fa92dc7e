"""The agent's verbs, and its reports about the workload."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

import pytest
from fakes.agent import FakeAgent

from pytest_fcvm.errors import GuestTimeout, UsageProblem, WorkloadExited
from pytest_fcvm.guest.agent import Agent, start_session
from pytest_fcvm.guest.frames import PROTOCOL_BOOT_SECRET, FieldTag, StreamKind
from pytest_fcvm.guest.streams import CallFailed
from pytest_fcvm.model.guest import (
    ExitStatus,
    GuestConfig,
    Identity,
    ListenState,
    ProcessSpec,
    WorkloadState,
    WorkloadStatus,
)
from pytest_fcvm.model.net import Proto

CONFIG = GuestConfig(
    hostname="base",
    machine_id="0123456789abcdef" * 2,
    upper_mib=128,
    mac="52:54:00:12:34:56",
    address="10.0.2.15/24",
    gateway="10.0.2.2",
    dns=("127.0.0.53",),
    hosts=("127.0.0.1 localhost", "10.0.2.15 base"),
    peer_gateway=True,
    volumes=("/data", "/srv/more"),
    shm_mib=64,
    ulimits={7: (1024, -1), 4: (0, 0)},
    sysctls={"net.core.somaxconn": "1024"},
)
IDENTITY = Identity(
    entropy=bytes(range(32)),
    realtime_ns=1_700_000_000_123_456_789,
    hosts=("10.0.2.15 clone",),
    boot_id="11111111-2222-3333-4444-555555555555",
    hook=("/bin/hook", "-x"),
)


def test_configure_and_start_send_all_settings(fake: FakeAgent, agent: Agent) -> None:
    agent.configure(CONFIG)
    assert agent.start(ProcessSpec(argv=("nginx", "-g", "daemon off;"), user="www-data")) == 1
    (configure, config), (start, process) = fake.executed
    assert (configure, start) == (StreamKind.CONFIGURE, StreamKind.START)
    assert {tag.name: config[tag] for tag in FieldTag if tag in config} == {
        "HOSTNAME": [b"base"],
        "MACHINE_ID": [b"0123456789abcdef" * 2],
        "UPPER_MIB": [struct.pack("<Q", 128)],
        "ROOT_DEVICE": [b"/dev/vda"],
        "INTERFACE": [b"eth0"],
        "MAC": [b"\x52\x54\x00\x12\x34\x56"],
        "ADDRESS": [b"10.0.2.15/24"],
        "GATEWAY": [b"10.0.2.2"],
        "DNS": [b"127.0.0.53"],
        "HOSTS": [b"127.0.0.1 localhost", b"10.0.2.15 base"],
        "PEER_GATEWAY": [struct.pack("<Q", 1)],
        "VOLUME": [b"/data", b"/srv/more"],
        "SHM_MIB": [struct.pack("<Q", 64)],
        "ULIMIT": [b"7:1024:-1", b"4:0:0"],
        "SYSCTL": [b"net.core.somaxconn=1024"],
    }
    assert process.texts(FieldTag.ARG) == ["nginx", "-g", "daemon off;"]
    assert agent.status() == WorkloadStatus(state=WorkloadState.RUNNING)


def test_personalise_sends_what_it_was_given_and_nothing_else(fake: FakeAgent, agent: Agent) -> None:
    agent.personalise(IDENTITY)
    agent.personalise(Identity(peer_gateway=False))
    (_, first), (_, second) = fake.executed
    assert {tag.name: first[tag] for tag in FieldTag if tag in first} == {
        "ENTROPY": [bytes(range(32))],
        "REALTIME_NS": [struct.pack("<Q", 1_700_000_000_123_456_789)],
        "HOSTS": [b"10.0.2.15 clone"],
        "BOOT_ID": [b"11111111-2222-3333-4444-555555555555"],
        "ARG": [b"/bin/hook", b"-x"],
    }
    assert second == {FieldTag.PEER_GATEWAY: [bytes(8)]}


@pytest.mark.parametrize("mac", ["52:54:00:12:34", "eth0", "52:54:00:12:34:5g"])
def test_an_invalid_mac_address_is_refused(mac: str, agent: Agent) -> None:
    with pytest.raises(UsageProblem, match="is not a MAC address"):
        agent.personalise(Identity(mac=mac))


def test_a_session_can_begin_with_identity_and_log(fake: FakeAgent, connect: Callable[[], socket.socket]) -> None:
    fake.log(b"before\n")
    got: list[bytes] = []
    with start_session(connect(), PROTOCOL_BOOT_SECRET, identity=IDENTITY, log_sink=got.append, timeout_s=10) as agent:
        assert fake.executed[0] == (StreamKind.PERSONALISE, fake.executed[0][1])
        fake.log(b"after\n")
        fake.exit_workload(code=0)
        agent.wait_until_workload_exit(10)
        agent.sync()
    assert fake.executed[0][1].text(FieldTag.HOSTS) == "10.0.2.15 clone"
    assert b"".join(got) == b"before\nafter\n"


def test_a_session_that_cannot_begin_closes_its_channel(fake: FakeAgent, connect: Callable[[], socket.socket]) -> None:
    fake.refusals[StreamKind.PERSONALISE] = (22, "RNDADDENTROPY: Invalid argument")
    sock = connect()
    with pytest.raises(CallFailed, match=r"personalise failed in the guest: RNDADDENTROPY: .* \(EINVAL\)"):
        start_session(sock, PROTOCOL_BOOT_SECRET, identity=IDENTITY, timeout_s=10)
    assert sock.fileno() == -1


def test_metrics_are_numbers_where_possible(agent: Agent) -> None:
    metrics = agent.metrics()
    assert metrics == {"uptime_ms": 1234, "load": 0.25, "kernel": "6.12.1"}
    assert [type(value) for value in metrics.values()] == [int, float, str]


def test_metrics_say_in_words_that_memory_ran_out(fake: FakeAgent, agent: Agent) -> None:
    fake.metrics = {"workload_oom_kills": "0"}
    assert "memory" not in agent.metrics()
    fake.metrics = {"workload_oom_kills": "2"}
    said = "the guest's memory ran out and its kernel killed 2 processes: give it more with mem=SIZE or --fcvm-mem SIZE"
    assert agent.metrics()["memory"] == said


def test_listening_distinguishes_closed_open_and_loopback(fake: FakeAgent, agent: Agent) -> None:
    fake.listening.update({80: 1, 5432: 2, 99: 77})
    assert agent.listening(80) is ListenState.OPEN
    assert agent.listening(5432, Proto.UDP) is ListenState.LOOPBACK_ONLY
    assert agent.listening(81) is ListenState.CLOSED
    assert agent.listening(99) is ListenState.CLOSED, "an answer not known yet is no yes"
    assert fake.executed[1][1].text(FieldTag.PROTO) == "udp"


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (StreamKind.CONFIGURE, lambda agent: agent.configure(CONFIG, timeout_s=0.02)),
        (StreamKind.START, lambda agent: agent.start(ProcessSpec(argv=("x",)), timeout_s=0.02)),
        (StreamKind.STATUS, lambda agent: agent.status(timeout_s=0.02)),
        (StreamKind.METRICS, lambda agent: agent.metrics(timeout_s=0.02)),
        (StreamKind.QUIESCE, lambda agent: agent.quiesce(b"s" * 16, timeout_s=0.02)),
        (StreamKind.SUSPEND, lambda agent: agent.suspend(b"s" * 16, timeout_s=0.02)),
        (StreamKind.FREEZE, lambda agent: agent.freeze(timeout_s=0.02)),
        (StreamKind.JOIN, lambda agent: agent.rename_hosts(["10.0.0.1 x"], timeout_s=0.02)),
        (StreamKind.PERSONALISE, lambda agent: agent.personalise(IDENTITY, timeout_s=0.02)),
        (StreamKind.LISTENING, lambda agent: agent.listening(80, timeout_s=0.02)),
        (StreamKind.STOP, lambda agent: agent.stop(15, timeout_s=0.02)),
        (StreamKind.POWEROFF, lambda agent: agent.poweroff(timeout_s=0.02)),
        (StreamKind.SYNC, lambda agent: agent.sync(timeout_s=0.02)),
        (StreamKind.EXEC, lambda agent: agent.exec(ProcessSpec(argv=("x",)), timeout_s=0.02)),
        (StreamKind.CONNECT, lambda agent: agent.connect(80, timeout_s=0.02)),
        (StreamKind.LOGS, lambda agent: agent.logs(print, timeout_s=0.02)),
        (StreamKind.TAR_IN, lambda agent: agent.tar_in("/srv", timeout_s=0.02)),
        (StreamKind.TAR_OUT, lambda agent: agent.tar_out("/srv", timeout_s=0.02)),
        (StreamKind.ACCEPT, lambda agent: agent.accept(9000, "127.77.0.1", timeout_s=0.02)),
        (StreamKind.ATTACH, lambda agent: agent.attach(7, timeout_s=0.02)),
    ],
)
def test_every_call_keeps_its_deadline_and_says_which_it_was(
    kind: StreamKind, call: Callable[[Agent], object], fake: FakeAgent, agent: Agent
) -> None:
    words = {StreamKind.TAR_IN: "copy to", StreamKind.TAR_OUT: "copy of"}
    fake.silent.add(kind)
    with pytest.raises(GuestTimeout, match=rf"{words.get(kind, kind.name.lower())}.* did not answer within 0\.02 s"):
        call(agent)


def test_no_kind_of_stream_is_without_a_deadline_test() -> None:
    marks = test_every_call_keeps_its_deadline_and_says_which_it_was.pytestmark  # type: ignore[attr-defined]
    assert {kind for kind, _ in marks[0].args[1]} == set(StreamKind)


def test_poweroff_is_done_when_the_channel_ends(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    thread = threading.Thread(target=agent.poweroff)
    thread.start()
    peer.take()
    peer.sock.close()
    thread.join(10)
    assert not thread.is_alive()
    assert agent.session.reason is not None


def test_the_end_of_the_workload_is_reported_once_to_every_callback(fake: FakeAgent, agent: Agent) -> None:
    told: list[ExitStatus] = []
    agent.on_workload_exit(told.append)
    assert agent.workload_exit is None
    agent.check_workload()
    agent.stop(15)
    assert agent.wait_until_workload_exit(10) == ExitStatus(signal=15)
    assert agent.status() == WorkloadStatus(state=WorkloadState.EXITED, exit=ExitStatus(signal=15))
    agent.on_workload_exit(told.append)
    assert told == [ExitStatus(signal=15)] * 2
    with pytest.raises(WorkloadExited, match="the workload ended with signal SIGTERM"):
        agent.check_workload()


def test_a_session_that_begins_after_the_workload_ended_learns_it_from_status(
    fake: FakeAgent, connect: Callable[[], socket.socket]
) -> None:
    fake.exit_workload(code=3)
    with start_session(connect(), PROTOCOL_BOOT_SECRET, timeout_s=10) as agent:
        agent.status()
        assert agent.wait_until_workload_exit(0) == ExitStatus(code=3)


def test_oom_kills_are_counted(fake: FakeAgent, agent: Agent) -> None:
    fake.say_oom(2)
    agent.sync()
    assert agent.oom_kills == 2
