"""How a session begins and ends, and what follows after a lost host."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from fakes.agent import FakeAgent

from pytest_fcvm.errors import EngineError, GuestError, GuestTimeout
from pytest_fcvm.guest.agent import Agent, start_session
from pytest_fcvm.guest.demux import Demultiplexer
from pytest_fcvm.guest.frames import (
    PROTOCOL_BOOT_SECRET,
    EventKind,
    FieldTag,
    FrameParser,
    FrameType,
    StreamKind,
    encode_fields,
    encode_frame,
    new_secret,
)
from pytest_fcvm.guest.session import Opening, Session
from pytest_fcvm.host import own
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.model.guest import Identity, ProcessSpec

Connect = Callable[[], socket.socket]
START = Opening(kind=StreamKind.START, what="start", fields=((FieldTag.ARG, "nginx"), (FieldTag.ENV, "A=1")))


def test_hello_identity_and_log_leave_in_one_write_that_begins_with_the_secret(cleanup: ExitStack) -> None:
    host, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # keeps writes apart
    cleanup.enter_context(guest)
    guest.settimeout(10)
    secret = new_secret()
    with pytest.raises(GuestTimeout, match=r"personalise did not answer within 0\.1 s"):
        start_session(host, secret, identity=Identity(boot_id="a"), log_sink=lambda _: None, timeout_s=0.1)
    data = guest.recv(1 << 16)
    assert data[:16] == secret
    hello, personalise, logs = FrameParser().feed(data[16:])
    assert hello.type is FrameType.HELLO
    assert [frame.payload[0] for frame in (personalise, logs)] == [StreamKind.PERSONALISE, StreamKind.LOGS]


def test_stale_bytes_before_the_nonce_are_dropped(cleanup: ExitStack, fake: FakeAgent, connect: Connect) -> None:
    stale = encode_frame(FrameType.REPLY, 1, bytes(4)) * 20_000 + encode_frame(FrameType.DATA, 5, b"half")[:-2]
    secret = PROTOCOL_BOOT_SECRET
    for rubbish in (b"\0", os.urandom(15), os.urandom(16), stale):
        fake.stale_on_attach = rubbish
        with start_session(connect(), secret, timeout_s=10) as agent:
            agent.sync()
            secret = agent.session.next_secret
    assert len(fake.executed) == 4


def test_the_nonce_is_found_however_the_bytes_arrive(peer_and_session: tuple) -> None:
    peer, session = peer_and_session
    session.start()
    peer.read_hello()
    nonce = peer.hello[4:20]
    welcome = encode_frame(FrameType.WELCOME, 0, b"\1\0\0\0slow")
    almost = nonce[:15] + (b"y" if nonce.endswith(b"x") else b"x")
    for byte in b"xx" + almost + nonce + welcome:
        peer.sock.sendall(bytes([byte]))
    assert session.wait_until_welcome(Deadline(10)) == "slow"


def test_the_nonce_is_found_in_pieces_of_every_size() -> None:
    class Nobody:
        lock, reason, builds = threading.Lock(), None, list[str]()

        def take_welcome(self, build_id: str) -> None:
            self.builds.append(build_id)

    for size in range(1, 40):
        hub, nonce = Nobody(), new_secret()
        demux = Demultiplexer(hub, nonce)  # type: ignore[arg-type]
        data = os.urandom(2000) + nonce[:-1] + b"\0" + nonce + encode_frame(FrameType.WELCOME, 0, b"\1\0\0\0x")
        for at in range(0, len(data), size):
            demux.feed(memoryview(data)[at : at + size])
        assert hub.builds.pop() == "x"


def test_a_session_that_was_answered_is_followed_with_one_secret(agent: Agent) -> None:
    _, written = record_greeting(lambda sock: Session.resume(sock, agent.session), [])
    assert written[:16] == agent.session.next_secret
    assert [frame.type for frame in FrameParser().feed(written[16:])] == [FrameType.HELLO]


def record_greeting(session_of: Callable[[socket.socket], Session], opening: list[Opening]) -> tuple[Session, bytes]:
    """Return a session that was lost right after its first write, and what it wrote."""
    host, guest = socket.socketpair()
    with guest:
        session = session_of(host)
        session.start(opening)
        written = guest.recv(1 << 20)
    session.close()
    return session, written


def deliver(connect: Connect, fake: FakeAgent, data: bytes) -> None:
    """Act as a host that writes `data` and dies."""
    before = fake.bytes_read
    sock = connect()
    sock.sendall(data)
    deadline = Deadline(10)
    while fake.bytes_read < before + len(data):
        assert not deadline.expired
        time.sleep(0)
    sock.close()


def test_a_host_that_dies_at_any_byte_has_done_all_or_nothing_and_the_next_one_gets_through(cleanup: ExitStack) -> None:
    _, written = record_greeting(lambda sock: Session(sock, PROTOCOL_BOOT_SECRET), [START])
    for length in range(len(written) + 1):
        with ExitStack() as stack:
            fake = stack.enter_context(FakeAgent())

            def connect(fake: FakeAgent = fake, stack: ExitStack = stack) -> socket.socket:
                host, guest = socket.socketpair()
                stack.callback(host.close)
                fake.attach(guest)
                return host

            lost, written = record_greeting(lambda sock: Session(sock, PROTOCOL_BOOT_SECRET), [START])
            deliver(connect, fake, written[:length])
            done = 1 if length == len(written) else 0
            assert [kind for kind, _ in fake.executed] == [StreamKind.START] * done
            session = stack.enter_context(Session.resume(connect(), lost))
            Agent(session).session.start()
            (stream,) = [session.open(Opening(kind=StreamKind.SYNC, what="sync"))]
            stream.wait_reply(Deadline(10))
            assert [kind for kind, _ in fake.executed] == [*[StreamKind.START] * done, StreamKind.SYNC]


def test_after_hosts_that_die_before_any_answer_the_next_one_gets_through(
    fake: FakeAgent, connect: Connect, cleanup: ExitStack
) -> None:
    lost, written = record_greeting(lambda sock: Session(sock, PROTOCOL_BOOT_SECRET), [])
    for length in (3, 16, 40, 78, 77, 78 * 2, 78 * 3 - 1, 78 * 9):
        deliver(connect, fake, written[:length])
        lost, written = record_greeting(lambda sock, lost=lost: Session.resume(sock, lost), [])
    session = cleanup.enter_context(Session.resume(connect(), lost))
    session.start()
    assert session.wait_until_welcome(Deadline(10)) == "fake"
    assert session.next_secret not in (lost.next_secret, PROTOCOL_BOOT_SECRET)


def test_only_the_last_secret_begins_a_session(fake: FakeAgent, connect: Connect, agent: Agent) -> None:
    with pytest.raises(GuestTimeout, match=r"did not answer hello within 0\.1 s") as caught:
        start_session(connect(), PROTOCOL_BOOT_SECRET, timeout_s=0.1)
    assert "has not answered hello" in caught.value.evidence["session"]
    with start_session(connect(), agent.session.next_secret, timeout_s=10) as second:
        second.sync()


def test_a_new_session_ends_the_streams_of_the_one_before(
    cleanup: ExitStack, fake: FakeAgent, connect: Connect, agent: Agent
) -> None:
    agent.exec(ProcessSpec(argv=("sleep",)))
    assert fake.open_streams() == 1
    with start_session(connect(), agent.session.next_secret, timeout_s=10):
        assert fake.open_streams() == 0


def test_quiesce_ends_the_session_and_leaves_the_channel_alone(
    peer_and_agent: tuple, channel_ends: tuple[socket.socket, socket.socket]
) -> None:
    peer, agent = peer_and_agent
    secret, logged = new_secret(), list[bytes]()
    opened = threading.Thread(target=agent.logs, args=(logged.append,))
    opened.start()
    peer.take()
    peer.reply(1)
    opened.join()
    quiet = threading.Thread(target=agent.quiesce, args=(secret,))
    quiet.start()
    frame = peer.take()
    assert frame.payload[0] == StreamKind.QUIESCE
    for _ in range(2):
        peer.send(FrameType.DATA, 1, b"\0" + bytes(32768))  # would be granted at once
    reply = encode_frame(FrameType.REPLY, frame.stream, bytes(4))
    late = encode_frame(FrameType.EVENT, 0, bytes([EventKind.WORKLOAD_EXIT]) + encode_fields([(FieldTag.EXIT_CODE, 0)]))
    peer.sock.sendall(reply + late)
    quiet.join(10)
    wait_until(lambda: "fcvm-session" not in {thread.name for thread in threading.enumerate()}, Deadline(10))
    assert agent.workload_exit is None, "input after the reply was read"
    assert sum(map(len, logged)) == 65536
    agent.session.abort(EngineError("the base was killed"))
    with pytest.raises(GuestError, match="ended when the guest was quiesced"):
        agent.sync()
    peer.sock.sendall(b"left in the channel")
    assert peer.take_all() == []
    assert channel_ends[0].recv(100) == b"left in the channel"
    assert agent.session.next_secret == secret


def test_a_quiesce_that_is_refused_leaves_the_session_as_it_was(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    before = agent.session.next_secret
    failures: list[BaseException] = []

    def quiesce() -> None:
        try:
            agent.quiesce(new_secret())
        except GuestError as error:
            failures.append(error)

    quiet = threading.Thread(target=quiesce)
    quiet.start()
    stream = peer.take().stream
    sync = threading.Thread(target=agent.sync)
    sync.start()
    assert peer.take_all() == [], "something was sent between QUIESCE and its reply"
    peer.reply(stream, (FieldTag.MESSAGE, "cgroup.freeze: Device or resource busy"), code=16)
    quiet.join(10)
    peer.reply(peer.take().stream)
    sync.join(10)
    assert not sync.is_alive()
    assert "cgroup.freeze: Device or resource busy (EBUSY)" in str(failures[0])
    assert agent.session.next_secret == before


@pytest.mark.parametrize("replied", [True, False])
def test_after_a_quiesce_the_next_session_begins_whether_it_was_answered_or_not(
    replied: bool, fake: FakeAgent, connect: Connect
) -> None:
    first = start_session(connect(), PROTOCOL_BOOT_SECRET, timeout_s=10)
    secret = new_secret()
    if replied:
        first.quiesce(secret)
    else:
        fake.silent.add(StreamKind.QUIESCE)
        with pytest.raises(GuestTimeout, match=r"quiesce did not answer within 0\.1 s"):
            first.quiesce(secret, timeout_s=0.1)
        with pytest.raises(GuestTimeout, match="quiesce"):
            first.sync()
    first.close()
    with Session.resume(connect(), first.session) as session:
        session.start()
        assert session.wait_until_welcome(Deadline(10)) == "fake"
    if replied:
        assert first.session.next_secret == secret


def test_a_session_without_a_free_descriptor_closes_its_socket(
    cleanup: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    cleanup.enter_context(theirs)

    def eventfd(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(own.os, "eventfd", eventfd)
    with pytest.raises(OSError, match="Too many open files"):
        start_session(ours, b"s" * 16)
    assert ours.fileno() == -1
