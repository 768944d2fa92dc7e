"""Credit in both directions, readers that do not read, and many streams and threads at the same time."""

from __future__ import annotations

import hashlib
import random
import struct
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes.agent import FakeAgent

from pytest_fcvm.guest.agent import Agent
from pytest_fcvm.guest.frames import (
    PROTOCOL_WINDOW,
    FieldTag,
    Frame,
    FrameType,
    ProtocolError,
    StreamKind,
    encode_fields,
)
from pytest_fcvm.guest.process import GuestProcess, StreamReader
from pytest_fcvm.guest.session import Opening
from pytest_fcvm.guest.streams import CallFailed
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.model.guest import ProcessSpec

HALF = PROTOCOL_WINDOW // 2
DEADLINE = Deadline(None)  # made at import: a deadline with an end would pass before the last tests run


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def running(peer_and_agent: tuple) -> tuple:
    """A peer and a program that it runs as stream 1."""
    peer, agent = peer_and_agent
    got: list[GuestProcess] = []
    thread = in_thread(lambda: got.append(agent.exec(ProcessSpec(argv=("cat",)))))
    peer.reply(peer.take().stream, (FieldTag.PID, 7))
    thread.join(10)
    return peer, got[0]


def data_bytes(frames: Iterable[Frame]) -> int:
    return sum(len(frame.payload) - 1 for frame in frames if frame.type is FrameType.DATA)


def grants(frames: list[Frame]) -> list[tuple[int, int]]:
    return [struct.unpack("<BI", frame.payload) for frame in frames if frame.type is FrameType.WINDOW]


def test_a_writer_sends_its_window_and_then_exactly_what_is_granted(running: tuple) -> None:
    peer, process = running
    data = random.Random(4).randbytes(300_000)
    thread = in_thread(lambda: process.stdin.write(data))
    frames = peer.take_all(until=lambda seen: data_bytes(seen) >= PROTOCOL_WINDOW)
    assert data_bytes(frames) == PROTOCOL_WINDOW
    for more in (1, 30_000, 0, 100_000, len(data)):
        peer.send(FrameType.WINDOW, 1, struct.pack("<BI", 0, more))
        due = min(more, len(data) - data_bytes(frames))
        fresh = peer.take_all(0.1, until=lambda seen, due=due: data_bytes(seen) >= due)
        assert data_bytes(fresh) == due
        frames += fresh
    thread.join(10)
    assert b"".join(frame.payload[1:] for frame in frames) == data
    assert {frame.payload[:1] for frame in frames} == {b"\0"}


@pytest.mark.parametrize("channel", [0, 1])
def test_a_reader_grants_half_a_window_once_it_has_read_as_much_and_not_before(
    channel: int, peer_and_agent: tuple
) -> None:
    peer, agent = peer_and_agent
    stream = agent.session.open(Opening(kind=StreamKind.EXEC, what="exec cat"))
    reader = StreamReader(stream, channel)
    peer.reply(peer.take().stream)
    for _ in range(16):
        peer.send(FrameType.DATA, 1, bytes([channel]) + bytes(PROTOCOL_WINDOW // 16))
    assert len(stream.read(channel, 4096, DEADLINE)) == 4096
    for _ in range(6):
        stream.read(channel, 4096, DEADLINE)
    stream.read(channel, 4095, DEADLINE)
    assert grants(peer.take_all(0.1)) == []
    assert len(stream.read(channel, 1, DEADLINE)) == 1
    assert grants(peer.take_all(0.1)) == [(channel, HALF)]
    assert len(reader.read(HALF)) == HALF
    assert grants(peer.take_all(0.1)) == [(channel, HALF)]


def test_collected_output_is_granted_without_a_reader(running: tuple) -> None:
    peer, process = running
    result: list[tuple[bytes, bytes]] = []
    peer.send(FrameType.DATA, 1, b"\0" + bytes(HALF))
    thread = in_thread(lambda: result.append(process.communicate(timeout_s=10)))
    for _ in range(10):
        for _ in range(2):
            assert peer.take().type in (FrameType.WINDOW, FrameType.EOF)
            peer.send(FrameType.DATA, 1, b"\0" + bytes(HALF))
    peer.send(FrameType.EXIT, 1, encode_fields([(FieldTag.EXIT_CODE, 0)]))
    thread.join(10)
    assert len(result[0][0]) == 21 * HALF


@pytest.mark.parametrize("channel", [0, 1])
def test_an_agent_that_sends_beyond_its_credit_loses_the_session(channel: int, running: tuple) -> None:
    peer, process = running
    for _ in range(2):
        peer.send(FrameType.DATA, 1, bytes([channel]) + bytes(HALF))
    peer.send(FrameType.DATA, 1, bytes([channel]))  # an empty frame uses no credit
    peer.send(FrameType.DATA, 1, bytes([channel]) + b"x")
    with pytest.raises(ProtocolError, match=r"DATA beyond credit, in the DATA frame at offset \d+"):
        process.wait(10)
    reader = (process.stdout, process.stderr)[channel]
    assert len(reader.read1()) == 2 * HALF, "earlier input stays readable"
    with pytest.raises(ProtocolError, match="DATA beyond credit"):
        reader.read1()


def test_data_after_eof_or_on_a_third_channel_ends_the_session(running: tuple) -> None:
    peer, process = running
    peer.send(FrameType.EOF, 1, b"\0")
    assert process.stdout.read() == b""
    peer.send(FrameType.DATA, 1, b"\0late")
    with pytest.raises(ProtocolError, match="DATA after EOF"):
        process.wait(10)


def test_frames_for_a_closed_stream_are_ignored(running: tuple, peer_and_agent: tuple) -> None:
    peer, process = running
    process.close()
    process.close()
    frames = peer.take_all(0.1)
    assert [(frame.type, frame.payload) for frame in frames] == [(FrameType.CLOSE, bytes(4))]
    for _ in range(5):
        peer.send(FrameType.DATA, 1, b"\0" + bytes(HALF))
    peer.send(FrameType.EXIT, 1, encode_fields([(FieldTag.EXIT_CODE, 0)]))
    assert peer.take_all(0.1) == []
    assert peer_and_agent[1].session.reason is None


def test_nothing_is_sent_for_a_program_that_has_ended(running: tuple) -> None:
    peer, process = running
    peer.send(FrameType.DATA, 1, b"\0" + bytes(HALF))
    peer.send(FrameType.EXIT, 1, encode_fields([(FieldTag.EXIT_CODE, 3)]))
    assert process.wait(10).code == 3
    process.signal(15)
    process.stdin.close()
    with pytest.raises(ValueError, match="closed"):
        process.stdin.write(b"x")
    assert len(process.stdout.read()) == HALF
    process.close()
    assert peer.take_all(0.1) == []


def test_a_reader_that_does_not_read_stalls_none_of_a_hundred_others(agent: Agent) -> None:
    stalled = agent.exec(ProcessSpec(argv=("flood", str(10_000_000))))
    digest = hashlib.sha256(flood_bytes(200_000)).hexdigest()

    def read_all(_: int) -> str:
        with agent.exec(ProcessSpec(argv=("flood", "200000"))) as process:
            return hashlib.sha256(process.communicate(timeout_s=30)[0]).hexdigest()

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(read_all, range(100))) == [digest] * 100
    assert stalled.poll() is None
    assert len(stalled.stdout.read()) == 10_000_000
    assert stalled.wait(10).code == 0


def flood_bytes(size: int) -> bytes:
    block = b"".join(struct.pack("<Q", n) for n in range(4096))
    return (block * (size // len(block) + 1))[:size]


def test_a_stalled_writer_stalls_nobody(agent: Agent) -> None:
    deaf = agent.exec(ProcessSpec(argv=("sleep",)))
    ended: list[BaseException] = []

    def write() -> None:
        try:
            deaf.stdin.write(bytes(1 << 20))
        except OSError as error:
            ended.append(error)

    thread = in_thread(write)
    for _ in range(20):
        agent.sync(timeout_s=10)
    assert agent.exec(ProcessSpec(argv=("cat",))).communicate(b"x" * 500_000, timeout_s=30)[0] == b"x" * 500_000
    assert thread.is_alive()
    deaf.close()
    thread.join(10)
    assert [type(error) for error in ended] == [BrokenPipeError]


def test_five_hundred_programs_run_at_once_and_each_gets_its_own_bytes(fake: FakeAgent, agent: Agent) -> None:
    processes = [agent.exec(ProcessSpec(argv=("cat",))) for _ in range(500)]
    assert fake.open_streams() == 500

    def talk(number: int) -> bool:
        data = random.Random(number).randbytes(5000 + number)
        return processes[number].communicate(data, timeout_s=60) == (data, b"")

    with ThreadPoolExecutor(32) as pool:
        assert all(pool.map(talk, range(500)))
    assert fake.open_streams() == 0
    assert {process.wait(1).code for process in processes} == {0}


def test_more_streams_than_the_agent_holds_are_refused(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fakes.agent_wire.PROTOCOL_STREAMS_MAX", 1024)
    processes = [agent.exec(ProcessSpec(argv=("sleep",))) for _ in range(1024)]
    with pytest.raises(CallFailed, match="EAGAIN") as caught:
        agent.exec(ProcessSpec(argv=("sleep",)))
    assert "16384 may be open" in caught.value.hint
    with pytest.raises(CallFailed, match="EAGAIN"):
        agent.connect(80)
    for process in processes:
        process.close()
    assert agent.exec(ProcessSpec(argv=("echo",))).wait(10).code == 0


def test_many_threads_use_every_kind_of_call_at_once(fake: FakeAgent, agent: Agent) -> None:
    fake.listening[80] = 1

    def work(number: int) -> bool:
        dice = random.Random(number)
        for _ in range(20):
            what = dice.randrange(4)
            if what == 0:
                assert agent.listening(80) == 1
            elif what == 1:
                assert agent.metrics()["uptime_ms"] == 1234
            elif what == 2:
                text = str(dice.random())
                assert agent.exec(ProcessSpec(argv=("echo", text))).stdout.read() == text.encode() + b"\n"
            else:
                data = dice.randbytes(100_000)
                assert agent.exec(ProcessSpec(argv=("cat",))).communicate(data, timeout_s=60)[0] == data
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))
    assert fake.open_streams() == 0


def test_a_big_output_arrives_whole_through_every_way_to_read_it(agent: Agent) -> None:
    size = 20_000_000
    expected = hashlib.sha256(flood_bytes(size)).digest()
    spec = ProcessSpec(argv=("flood", str(size)))
    ways: list[Callable[[GuestProcess], bytes]] = [
        lambda process: process.communicate(timeout_s=60)[0],
        lambda process: process.stdout.read(),
        lambda process: b"".join(iter(lambda: process.stdout.read(70_001), b"")),
        lambda process: b"".join(iter(lambda: process.stdout.read1(999), b"")),
        lambda process: b"".join(process.stdout),
    ]
    for way in ways:
        with agent.exec(spec) as process:
            assert hashlib.sha256(way(process)).digest() == expected
            assert process.wait(10).code == 0


def test_a_big_input_arrives_whole(agent: Agent) -> None:
    process = agent.exec(ProcessSpec(argv=("sink",)))
    assert process.communicate(bytes(20_000_000), timeout_s=60)[0] == b"20000000"
