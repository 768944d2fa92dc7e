"""How a session ends: at once for all callers, with its reason, whichever side ended it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from fakes.agent import FakeAgent

from pytest_fcvm.errors import EngineError, FcvmError, GuestError, GuestTimeout, UsageProblem
from pytest_fcvm.guest.agent import Agent, start_session
from pytest_fcvm.guest.frames import (
    PROTOCOL_BOOT_SECRET,
    EventKind,
    FieldTag,
    FrameType,
    ProtocolError,
    StreamKind,
    encode_fields,
    encode_frame,
    new_secret,
)
from pytest_fcvm.guest.session import Session
from pytest_fcvm.host.clock import Deadline
from pytest_fcvm.model.guest import ExitStatus, ProcessSpec

Connect = Callable[[], socket.socket]


def waits_of(agent: Agent) -> list[Callable[[], object]]:
    """Every way to wait for the guest."""
    process = agent.exec(ProcessSpec(argv=("sleep",)))
    writer = agent.exec(ProcessSpec(argv=("sleep",)))
    return [
        lambda: process.wait(60),
        process.stdout.read,
        process.stderr.readline,
        lambda: process.communicate(timeout_s=60),
        lambda: writer.stdin.write(bytes(1 << 20)),
        lambda: agent.status(timeout_s=60),
        lambda: agent.wait_until_workload_exit(60),
        lambda: agent.exec(ProcessSpec(argv=("sleep",))).wait(None),
    ]


@pytest.mark.parametrize("how", ["abort", "hang up", "close", "error frame"])
def test_the_end_of_a_session_fails_every_wait_at_once_with_its_reason(how: str, fake: FakeAgent, agent: Agent) -> None:
    fake.silent.add(StreamKind.STATUS)
    failures: list[BaseException] = []

    def wait(call: Callable[[], object]) -> None:
        try:
            call()
        except FcvmError as error:
            failures.append(error)

    calls = waits_of(agent) * 5
    threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    ends: dict[str, tuple[Callable[[], object], str]] = {
        "abort": (lambda: agent.session.abort(EngineError("QEMU was killed by SIGSEGV")), "killed by SIGSEGV"),
        "hang up": (fake.hang_up, "the channel to the agent ended"),
        "close": (agent.close, "closed by the host"),
        "error frame": (lambda: fake.send_raw(encode_frame(FrameType.ERROR, 0, bytes(8) + b"no")), "offset 0: no"),
    }
    act, expected = ends[how]
    started = time.perf_counter()
    act()
    for thread in threads:
        thread.join(5)
    assert time.perf_counter() - started < 5
    assert len(failures) == len(calls)
    assert {type(error) for error in failures} == {EngineError if how == "abort" else GuestError}
    assert all(expected in str(error) for error in failures)
    assert len({id(error) for error in failures}) == len(failures), "threads share one traceback"
    with pytest.raises(FcvmError, match=expected):
        agent.sync()


def test_a_better_reason_replaces_the_end_of_the_channel_and_nothing_else(fake: FakeAgent, agent: Agent) -> None:
    fake.hang_up()
    with pytest.raises(GuestError, match="the channel to the agent ended: end of file"):
        agent.wait_until_workload_exit(10)
    agent.session.abort(EngineError("QEMU was killed"))
    with pytest.raises(EngineError, match="QEMU was killed"):
        agent.sync()
    agent.session.abort(EngineError("something later"))
    with pytest.raises(EngineError, match="QEMU was killed"):
        agent.sync()


def test_the_owner_may_explain_why_the_channel_ended(fake: FakeAgent, connect: Connect) -> None:
    def explain() -> FcvmError:
        return EngineError("exit code 1", evidence={"VMM log": "out of memory"})

    with start_session(connect(), PROTOCOL_BOOT_SECRET, explain=explain, timeout_s=10) as agent:
        fake.hang_up()
        with pytest.raises(EngineError, match="exit code 1") as caught:
            agent.wait_until_workload_exit(10)
    assert caught.value.evidence == {"VMM log": "out of memory"}


def test_closing_twice_and_from_many_threads_leaves_no_thread(agent: Agent) -> None:
    threads = [threading.Thread(target=agent.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    agent.close()
    assert "fcvm-session" not in {thread.name for thread in threading.enumerate()}


def test_a_session_that_was_never_started_can_be_closed(cleanup: ExitStack) -> None:
    host, guest = socket.socketpair()
    with guest, Session(host, new_secret()):
        pass
    assert host.fileno() == -1


def test_closing_leaves_the_channel_open_for_others_that_hold_it(fake: FakeAgent, connect: Connect) -> None:
    held = connect()
    first = start_session(held.dup(), PROTOCOL_BOOT_SECRET, timeout_s=10)
    first.close()
    with start_session(held.dup(), first.session.next_secret, timeout_s=10) as second:
        second.sync()


def test_a_callback_may_close_the_session_and_must_not_wait_for_it(fake: FakeAgent, agent: Agent) -> None:
    seen: list[BaseException] = []
    done = threading.Event()

    def callback(_: object) -> None:
        try:
            agent.sync()
        except UsageProblem as error:
            seen.append(error)
        agent.close()
        done.set()

    agent.on_workload_exit(callback)
    fake.exit_workload(code=0)
    assert done.wait(10)
    agent.close()
    assert "do the work on another thread" in str(seen[0])


def test_a_callback_that_fails_ends_the_session_and_every_wait(fake: FakeAgent, agent: Agent) -> None:
    agent.on_workload_exit(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    process = agent.exec(ProcessSpec(argv=("sleep",)))
    fake.exit_workload(code=0)
    with pytest.raises(GuestError, match="ZeroDivisionError"):
        process.wait(10)


def test_an_agent_of_another_version_is_named(peer_and_session: tuple) -> None:
    peer, session = peer_and_session
    session.start()
    peer.welcome(version=7)
    with pytest.raises(GuestError, match="protocol version 7, this package 1") as caught:
        session.wait_until_welcome(Deadline(10))
    assert "--fcvm-rebuild" in caught.value.hint


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (encode_frame(FrameType.OPEN, 1, bytes(5)), "only the host may send"),
        (encode_frame(FrameType.HELLO, 0), "does not belong on stream 0"),
        (encode_frame(FrameType.WELCOME, 0, b"\1\0\0\0x"), "a second or short WELCOME"),
        (encode_frame(FrameType.EVENT, 0), "an empty EVENT"),
        (encode_frame(FrameType.REPLY, 2, bytes(4)), "stream 2 was never opened"),
        (encode_frame(FrameType.REPLY, 1, bytes(3)), "a second or short REPLY"),
        (encode_frame(FrameType.DATA, 1, b"\0x"), "a channel that the stream does not have"),
        (encode_frame(FrameType.EXIT, 1), "EXIT for STATUS"),
        (encode_frame(FrameType.WINDOW, 1, b"\1\0\0\0\0"), "a malformed WINDOW"),
        (encode_frame(FrameType.CLOSE, 1), "a malformed CLOSE"),
        (encode_frame(FrameType.REPLY, 1, bytes(4) + b"\1\0\xff\0\0\0"), "malformed fields"),
        (b"\xff" * 20, "a payload of"),
    ],
)
def test_an_agent_that_breaks_the_protocol_loses_the_session(
    frame: bytes, complaint: str, peer_and_agent: tuple
) -> None:
    peer, agent = peer_and_agent
    failures: list[BaseException] = []

    def status() -> None:
        try:
            agent.status(timeout_s=10)
        except ProtocolError as error:
            failures.append(error)

    thread = threading.Thread(target=status)
    thread.start()
    peer.take()
    peer.sock.sendall(frame)
    thread.join(10)
    assert complaint in str(failures[0])
    if complaint != "malformed fields":  # in one reply only: that call fails, the session goes on
        assert "offset" in str(failures[0])
        with pytest.raises(ProtocolError, match=complaint):
            agent.sync()


def test_random_bytes_after_the_nonce_end_the_session_and_nothing_hangs(cleanup: ExitStack) -> None:
    for seed in range(50):
        host, guest = socket.socketpair()
        with guest, Session(host, PROTOCOL_BOOT_SECRET) as session:
            session.start()
            hello = guest.recv(1 << 16)
            guest.sendall(hello[16 + 9 + 4 :][:16] + os.urandom(2000 + seed))
            with pytest.raises(GuestError, match=r"offset|protocol version"):
                session.wait_until_welcome(Deadline(10))


def test_events_of_a_kind_not_known_yet_are_ignored(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    peer.send(FrameType.EVENT, 0, b"\xee")
    peer.send(FrameType.EVENT, 0, bytes([EventKind.OOM]) + encode_fields([(FieldTag.OOM_KILLS, 3)]))
    peer.send(FrameType.EVENT, 0, bytes([EventKind.WORKLOAD_EXIT]) + encode_fields([(FieldTag.EXIT_SIGNAL, 9)]))
    assert str(agent.wait_until_workload_exit(10)) == "signal SIGKILL"
    assert agent.oom_kills == 3


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time module as patched by a library that stops time."""
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: 1.0)
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.mark.usefixtures("stopped_clock")
def test_deadlines_pass_while_a_test_has_stopped_the_clock(fake: FakeAgent, agent: Agent) -> None:
    fake.silent |= {StreamKind.STATUS, StreamKind.CONNECT}
    process = agent.exec(ProcessSpec(argv=("sleep", "9")))
    process.stdout.timeout_s = 0.05
    for call, what in (
        (lambda: agent.status(timeout_s=0.05), "status did not answer within 0.05 s"),
        (lambda: agent.connect(80, 0.05), "connect to port 80 did not answer within 0.05 s"),
        (lambda: process.wait(0.05), "exec sleep 9 did not end within 0.05 s"),
        (process.stdout.read, "exec sleep 9 did not bring data within 0.05 s"),
        (lambda: process.communicate(bytes(100_000), timeout_s=0.05), "exec sleep 9 did not take data within 0.05 s"),
        (lambda: agent.wait_until_workload_exit(0.05), "the workload did not end within 0.05 s"),
    ):
        with pytest.raises(GuestTimeout, match=what) as caught:
            call()
        assert caught.value.hint
        assert "the agent has answered hello" in caught.value.evidence["session"]
    agent.sync()


def test_a_reply_that_comes_after_its_deadline_is_ignored(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    with pytest.raises(GuestTimeout, match="status"):
        agent.status(timeout_s=0.05)
    late = peer.take().stream
    thread = threading.Thread(target=agent.sync)
    thread.start()
    peer.reply(late)
    peer.reply(peer.take().stream)
    thread.join(10)
    assert not thread.is_alive()
    assert agent.session.reason is None


def test_a_program_that_did_not_start_in_time_is_abandoned(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    with pytest.raises(GuestTimeout, match="exec x did not answer"):
        agent.exec(ProcessSpec(argv=("x",)), timeout_s=0.05)
    assert [(frame.type, frame.stream) for frame in peer.take_all(0.1)] == [(FrameType.OPEN, 1), (FrameType.CLOSE, 1)]


def test_a_channel_that_can_only_be_read_ends_the_session(
    peer_and_agent: tuple,
) -> None:
    peer, agent = peer_and_agent
    peer.sock.shutdown(socket.SHUT_RD)
    with pytest.raises(GuestError, match=r"the channel to the agent ended: .*Broken pipe"):
        agent.status(timeout_s=30)


def test_the_first_report_of_the_workloads_end_counts(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    for code in (1, 2):
        body = bytes([EventKind.WORKLOAD_EXIT]) + encode_fields([(FieldTag.EXIT_CODE, code)])
        peer.send(FrameType.EVENT, 0, body)
    sync = threading.Thread(target=agent.sync)
    sync.start()
    peer.reply(peer.take().stream)
    sync.join(10)
    assert agent.workload_exit == ExitStatus(code=1)


def test_callers_keep_their_deadlines_while_the_channel_is_full(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    spec = ProcessSpec(argv=("echo", "x" * 1_000_000))
    for _ in range(5):  # 5 MB of requests for a peer that reads nothing
        with pytest.raises(GuestTimeout, match=r"exec echo x+ did not answer within 0\.05 s"):
            agent.exec(spec, timeout_s=0.05)
    closed = lambda seen: sum(frame.type is FrameType.CLOSE for frame in seen) == 5  # noqa: E731
    frames = peer.take_all(until=closed)
    opened = [frame.stream for frame in frames if frame.type is FrameType.OPEN]
    assert opened == [1, 2, 3, 4, 5], "what was asked for is still sent, whole and in order"
    assert sum(len(frame.payload) for frame in frames if frame.type is FrameType.BODY) > 4_500_000
