"""The agent's streams other than programs: sockets, tar, logs."""

from __future__ import annotations

import io
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fakes.agent import FakeAgent

from pytest_fcvm.errors import GuestError, GuestTimeout
from pytest_fcvm.guest.agent import Agent
from pytest_fcvm.guest.frames import FieldTag, FrameType
from pytest_fcvm.guest.streams import CallFailed

# Sockets


@pytest.fixture
def listener(cleanup: ExitStack, fake: FakeAgent) -> socket.socket:
    """A listening socket behind port 80 of the guest."""
    sock = cleanup.enter_context(socket.create_server(("127.0.0.1", 0)))
    sock.settimeout(10)
    fake.ports[80] = sock.getsockname()
    return sock


@pytest.fixture
def server(cleanup: ExitStack, listener: socket.socket) -> Iterator[Callable[[], socket.socket]]:
    def accept() -> socket.socket:
        peer, _ = listener.accept()
        peer.settimeout(10)
        return cleanup.enter_context(peer)

    return accept


def test_a_connection_carries_both_ways_and_is_closed_by_halves(
    server: Callable[[], socket.socket], fake: FakeAgent, agent: Agent
) -> None:
    sock = agent.connect(80, 10, address="10.0.2.15")
    peer = server()
    assert fake.executed[-1][1].text(FieldTag.ADDRESS) == "10.0.2.15"
    sock.sendall(b"GET /")
    assert peer.recv(100) == b"GET /"
    sock.shutdown_write()
    assert peer.recv(100) == b""
    peer.sendall(b"answer")
    assert sock.recv(3, timeout_s=10) == b"ans"
    assert sock.recv(timeout_s=10) == b"wer"
    peer.close()
    assert sock.recv(timeout_s=10) == b""
    with pytest.raises(BrokenPipeError):
        sock.sendall(b"more")
    agent.sync()
    assert fake.open_streams() == 0
    sock.close()


def test_the_guests_half_may_be_closed_first(server: Callable[[], socket.socket], agent: Agent) -> None:
    with agent.connect(80, 10) as sock:
        peer = server()
        peer.shutdown(socket.SHUT_WR)
        assert sock.recv(timeout_s=10) == b""
        sock.sendall(b"still here")
        assert peer.recv(100) == b"still here"


def test_a_reset_comes_after_what_was_sent_before_it(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    thread = threading.Thread(target=lambda: peer.reply(peer.take().stream))
    thread.start()
    sock = agent.connect(80, 10)
    thread.join()
    peer.send(FrameType.DATA, 1, b"\0last words")
    peer.send(FrameType.CLOSE, 1, struct.pack("<I", 104))
    assert sock.recv(timeout_s=10) == b"last words"
    with pytest.raises(ConnectionResetError, match="connect to port 80"):
        sock.recv(timeout_s=10)
    with pytest.raises(ConnectionResetError):
        sock.sendall(b"x")
    sock.close()
    assert peer.take_all(0.1) == []


def test_a_reset_by_the_host_reaches_the_guest(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    thread = threading.Thread(target=lambda: peer.reply(peer.take().stream))
    thread.start()
    sock = agent.connect(80, 10)
    thread.join()
    sock.reset()
    sock.close()
    assert [(frame.type, frame.payload) for frame in peer.take_all(0.1)] == [(FrameType.CLOSE, struct.pack("<I", 104))]


def test_a_port_without_a_listener_refuses(agent: Agent) -> None:
    with pytest.raises(ConnectionRefusedError, match="connect to port 81 failed in the guest"):
        agent.connect(81)


def test_a_silent_peer_costs_the_deadline_and_no_more(server: Callable[[], socket.socket], agent: Agent) -> None:
    sock = agent.connect(80, 10)
    server()
    with pytest.raises(GuestTimeout, match=r"connect to port 80 did not bring data within 0\.05 s"):
        sock.recv(timeout_s=0.05)


# Tar


def packed(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_files_travel_both_ways_as_tar(fake: FakeAgent, agent: Agent, tmp_path: Path) -> None:
    fake.root = tmp_path
    (tmp_path / "srv").mkdir()
    data = bytes(range(256)) * 4000
    with agent.tar_in("/srv", user="www-data", timeout_s=30) as sink:
        assert sink.write(packed({"a/b": data, "c": b"c"})) > len(data)
    assert (tmp_path / "srv/a/b").read_bytes() == data
    assert fake.executed[-1][1].text(FieldTag.USER) == "www-data"
    with agent.tar_out("/srv", timeout_s=30) as source, tarfile.open(fileobj=source, mode="r|") as tar:  # type: ignore[call-overload]
        got = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    assert got == {"./a/b": data, "./c": b"c"}
    with agent.tar_out("/srv/c", timeout_s=30) as source, tarfile.open(fileobj=io.BytesIO(source.read())) as tar:
        assert tar.getnames() == ["c"]
    assert fake.open_streams() == 0


def test_a_copy_to_or_from_a_missing_path_names_it(fake: FakeAgent, agent: Agent, tmp_path: Path) -> None:
    fake.root = tmp_path
    with pytest.raises(CallFailed, match=r"copy to /nowhere failed in the guest: open .*\(ENOENT\)"):
        agent.tar_in("/nowhere")
    with pytest.raises(CallFailed, match=r"copy of /nowhere failed in the guest: open .*\(ENOENT\)"):
        agent.tar_out("/nowhere")


def test_a_copy_that_fails_half_way_says_why(fake: FakeAgent, agent: Agent, tmp_path: Path) -> None:
    fake.root = tmp_path
    with pytest.raises(GuestError, match=r"copy to / failed in the guest: exit code 1 \(.+\)"):
        agent.tar_in("/", timeout_s=10).close()
    sink = agent.tar_in("/", timeout_s=10)
    sink.write(b"this is no tar stream" * 100)
    with pytest.raises(GuestError, match=r"copy to / failed in the guest: exit code 1 \(.+\)"):
        sink.close()


def test_an_agent_that_gives_up_while_a_copy_is_sent_is_quoted(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    thread = threading.Thread(target=lambda: peer.reply(peer.take().stream))
    thread.start()
    sink = agent.tar_in("/srv", timeout_s=10)
    thread.join()
    exit_fields = struct.pack("<HI", FieldTag.EXIT_CODE, 8) + struct.pack("<Q", 1)
    message = b"write /srv/x: No space left on device"
    peer.send(FrameType.EXIT, 1, exit_fields + struct.pack("<HI", FieldTag.MESSAGE, len(message)) + message)
    with pytest.raises(GuestError, match="No space left on device"):
        sink.write(bytes(1 << 20))


def test_a_copy_that_the_caller_breaks_off_is_abandoned(fake: FakeAgent, agent: Agent, tmp_path: Path) -> None:
    fake.root = tmp_path

    def fail(sink: object) -> None:
        raise RuntimeError("caller's own")

    with pytest.raises(RuntimeError, match="caller's own"), agent.tar_in("/") as sink:
        fail(sink)
    agent.sync()
    assert fake.open_streams() == 0


def test_an_agent_that_could_not_send_all_of_a_copy_is_quoted_at_its_end(peer_and_agent: tuple) -> None:
    peer, agent = peer_and_agent
    thread = threading.Thread(target=lambda: peer.reply(peer.take().stream))
    thread.start()
    source = agent.tar_out("/srv", timeout_s=10)
    thread.join()
    peer.send(FrameType.DATA, 1, b"\0" + bytes(512))
    peer.send(FrameType.EXIT, 1, struct.pack("<HIQ", FieldTag.EXIT_CODE, 8, 2))
    assert source.read(512) == bytes(512)
    with pytest.raises(GuestError, match="copy of /srv failed in the guest: exit code 2"):
        source.read(512)


# Logs


def test_the_log_brings_what_was_printed_before_and_after_and_then_ends(fake: FakeAgent, agent: Agent) -> None:
    fake.log(b"one\n")
    got: list[bytes] = []
    log = agent.logs(got.append)
    fake.log(b"two\n")
    with pytest.raises(GuestTimeout, match="logs did not end"):
        log.wait_until_end(0.05)
    fake.log(b"three\n")
    fake.exit_workload(code=0)
    log.wait_until_end(10)
    assert b"".join(got) == b"one\ntwo\nthree\n"


def test_a_log_of_many_windows_needs_only_its_sink(fake: FakeAgent, agent: Agent) -> None:
    size = 0

    def sink(data: bytes) -> None:
        nonlocal size
        size += len(data)

    log = agent.logs(sink)
    for number in range(100):
        fake.log(bytes([number]) * 60_000)
        agent.sync()  # the ring is empty again
    fake.exit_workload(code=0)
    log.wait_until_end(10)
    assert size == 6_000_000


def test_a_sink_that_fails_loses_the_log_and_nothing_else(fake: FakeAgent, agent: Agent) -> None:
    def sink(data: bytes) -> None:
        raise OSError(28, "No space left on device")

    log = agent.logs(sink)
    fake.log(b"x")
    with pytest.raises(GuestError, match=r"the receiver of logs failed: .*No space left"):
        log.wait_until_end(10)
    agent.sync()
    assert fake.open_streams() == 0


def test_a_log_that_is_no_longer_followed_is_left_to_the_guest(fake: FakeAgent, agent: Agent) -> None:
    got: list[bytes] = []
    agent.logs(got.append).close()
    agent.sync()
    fake.log(b"unheard")
    agent.sync()
    assert got == []
