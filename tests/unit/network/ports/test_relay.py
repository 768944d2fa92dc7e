"""The relay from TCP clients on the host to a guest, here a server in this process: by threads, and by an agent."""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # for `fakes`

from fakes.agent import FakeAgent

from pytest_fcvm.errors import EngineError, GuestError, HostError
from pytest_fcvm.guest.agent import start_session
from pytest_fcvm.guest.frames import PROTOCOL_BOOT_SECRET, StreamKind
from pytest_fcvm.host.clock import Deadline, monotonic, wait_until
from pytest_fcvm.host.sockets import Socket
from pytest_fcvm.host.threads import ServiceThread
from pytest_fcvm.model.net import NO_LISTENER, Endpoint, PublishedPort
from pytest_fcvm.network.links import ByteStream
from pytest_fcvm.network.ports.datagrams import DatagramStream
from pytest_fcvm.network.ports.relay import Dialled, Relay, Serve

_PORT = PublishedPort(guest_port=80)
_WAIT_S = 20


class SocketStream:
    """A byte stream into the guest over a TCP socket, which behaves as the agent's."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, timeout=_WAIT_S)

    def recv(self, size: int) -> bytes:
        return self.sock.recv(size)

    def sendall(self, data: bytes) -> None:
        self.sock.sendall(data)

    def shutdown_write(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        with suppress(OSError):  # already closed
            _arm_reset(self.sock)
            self.sock.shutdown(socket.SHUT_RD)  # wakes a reader, as the session does
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class Guest:
    """A server of the guest: hands out what connects to it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        self._listener.settimeout(_WAIT_S)
        self.address = self._listener.getsockname()

    def dial(self, _port: int) -> ByteStream:
        return SocketStream(self.address)

    def take_all(self) -> None:
        """Echo for whoever connects from now on."""
        self._stack.callback(self._listener.shutdown, socket.SHUT_RDWR)
        _start(self._echo)

    def _echo(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        peers = {}
        with suppress(OSError):
            while True:
                for descriptor, _ in poll.poll():
                    if peer := peers.get(descriptor):
                        peer.sendall(peer.recv(100))
                        continue
                    peer = self.accept()
                    peers[peer.fileno()] = peer
                    poll.register(peer, select.POLLIN)

    def accept(self) -> socket.socket:
        peer, _ = self._listener.accept()
        peer.settimeout(_WAIT_S)
        return self._stack.enter_context(peer)


def _arm_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def no_datagrams(_port: int) -> DatagramStream:
    raise AssertionError("no test here sends a datagram")


def _relay_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fcvm-relay"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is closed after the test; then no thread of a relay may live."""
    with ExitStack() as stack:
        yield stack
    assert wait_until(lambda: not _relay_threads(), Deadline(_WAIT_S)), _relay_threads()


@pytest.fixture
def guest(stack: ExitStack) -> Guest:
    """A server of the guest."""
    return Guest(stack)


def dialled(dial: Callable[[int], ByteStream]) -> Serve:
    """Serve ports by threads."""
    return lambda listener, port, report_fault: Dialled(lambda: dial(port), ServiceThread, listener, report_fault)


@pytest.fixture
def fake(stack: ExitStack, guest: Guest) -> FakeAgent:
    """An agent of the guest."""
    fake = stack.enter_context(FakeAgent())
    fake.ports.update({80: guest.address, 81: guest.address})
    return fake


@pytest.fixture
def served(stack: ExitStack, fake: FakeAgent) -> Serve:
    """Serve ports by an agent, on the thread of its session."""
    host, theirs = socket.socketpair()
    fake.attach(theirs)
    return stack.enter_context(start_session(host, PROTOCOL_BOOT_SECRET, timeout_s=_WAIT_S)).serve


@pytest.fixture(params=["threads", "agent"])
def relay(request: pytest.FixtureRequest, stack: ExitStack, guest: Guest) -> Relay:
    """A relay to it."""
    serve = dialled(guest.dial) if request.param == "threads" else request.getfixturevalue("served")
    relay = Relay(serve, no_datagrams, ServiceThread)
    stack.callback(relay.close)
    return relay


@pytest.fixture
def connect(stack: ExitStack, relay: Relay) -> Callable[[], socket.socket]:
    """Connect to the relayed port."""
    return lambda: stack.enter_context(socket.create_connection(relay.publish(_PORT), timeout=_WAIT_S))


def test_a_port_is_published_on_loopback_and_keeps_its_address(relay: Relay) -> None:
    first = relay.publish(_PORT)
    assert (first.host, first.port > 0) == ("127.0.0.1", True)
    assert relay.publish(_PORT) == first
    assert relay.publish(PublishedPort(guest_port=81)).port != first.port


def test_a_taken_host_port_is_named_with_what_to_do(relay: Relay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError) as caught:
            relay.publish(PublishedPort(guest_port=80, host_port=port))
    assert caught.value.message == f"guest port 80 cannot be published on 127.0.0.1:{port}/tcp: Address already in use"
    assert caught.value.hint == "publish another host port, or 0 for a free one (--fcvm-publish 0:80)"


def test_a_client_that_has_half_closed_still_gets_the_answer(
    connect: Callable[[], socket.socket], guest: Guest
) -> None:
    client, server = connect(), guest.accept()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert _read_all(server) == b"question"
    server.sendall(b"answer")
    server.close()
    assert _read_all(client) == b"answer"


def test_a_guest_that_has_half_closed_still_gets_the_clients_bytes(
    connect: Callable[[], socket.socket], guest: Guest
) -> None:
    client, server = connect(), guest.accept()
    server.sendall(b"banner")
    server.shutdown(socket.SHUT_WR)
    assert _read_all(client) == b"banner"
    client.sendall(b"later")
    client.close()
    assert _read_all(server) == b"later"


def test_a_reset_by_the_guest_reaches_the_client(connect: Callable[[], socket.socket], guest: Guest) -> None:
    client, server = connect(), guest.accept()
    _arm_reset(server)
    server.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_reset_by_the_client_reaches_the_guest(connect: Callable[[], socket.socket], guest: Guest) -> None:
    client, server = connect(), guest.accept()
    server.sendall(b"x")
    assert client.recv(1) == b"x"
    _arm_reset(client)
    client.close()
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_a_port_keeps_its_address_until_another_is_asked_for(stack: ExitStack, relay: Relay, guest: Guest) -> None:
    first = relay.publish(PublishedPort(guest_port=80))
    own = PublishedPort(guest_port=80, host_ip="127.0.0.9", host_port=first.port)
    assert relay.publish(own) == ("127.0.0.9", first.port) != first
    assert relay.publish(own) == relay.publish(PublishedPort(guest_port=80)) == ("127.0.0.9", first.port)
    for endpoint in (first, ("127.0.0.9", first.port)):
        client = stack.enter_context(socket.create_connection(endpoint, timeout=_WAIT_S))
        client.sendall(b"x")
        assert guest.accept().recv(1) == b"x"
    relay.close()
    for endpoint in (first, ("127.0.0.9", first.port)):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(endpoint, timeout=_WAIT_S)


@pytest.mark.parametrize("error", [ConnectionRefusedError(), GuestError("the agent is gone")])
def test_a_guest_port_that_refuses_resets_the_client(stack: ExitStack, error: Exception) -> None:
    def refuse(_port: int) -> ByteStream:
        raise error

    relay = Relay(dialled(refuse), no_datagrams, ServiceThread)
    stack.callback(relay.close)
    endpoint = relay.publish(_PORT)
    with pytest.raises(ConnectionResetError):
        _receive(endpoint)
    reason = NO_LISTENER if isinstance(error, ConnectionRefusedError) else error
    assert relay.fault == f"a connection to guest port 80 was reset: {reason}"


@pytest.mark.parametrize("code", [errno.ECONNREFUSED, errno.EAGAIN])
def test_a_port_that_the_agent_cannot_reach_resets_the_client_and_reports_why(
    stack: ExitStack, served: Serve, fake: FakeAgent, code: int
) -> None:
    fake.refusals[StreamKind.CONNECT] = (code, "16384 streams are open already")
    relay = Relay(served, no_datagrams, ServiceThread)
    stack.callback(relay.close)
    endpoint = relay.publish(_PORT)
    with pytest.raises(ConnectionResetError):
        _receive(endpoint)
    reason = NO_LISTENER if code == errno.ECONNREFUSED else "16384 streams are open already"
    assert relay.fault == f"a connection to guest port 80 was reset: {reason}"


def test_an_agent_serves_two_thousand_connections_at_once_without_a_thread_for_each(
    stack: ExitStack, served: Serve, guest: Guest
) -> None:
    relay = Relay(served, no_datagrams, ServiceThread)
    stack.callback(relay.close)
    endpoint, threads = relay.publish(_PORT), threading.active_count()
    guest.take_all()
    started = monotonic()
    clients = [stack.enter_context(socket.create_connection(endpoint, timeout=_WAIT_S)) for _ in range(2000)]
    assert monotonic() - started < _WAIT_S / 2  # a connection that a full backlog drops is retried after a second
    for client in clients:
        client.sendall(b"x")
    assert all(client.recv(1) == b"x" for client in clients)
    assert threading.active_count() <= threads + 1  # the guest's


def test_connections_of_an_agent_end_with_its_session(
    stack: ExitStack, served: Serve, fake: FakeAgent, guest: Guest
) -> None:
    relay = Relay(served, no_datagrams, ServiceThread)
    stack.callback(relay.close)
    endpoint = relay.publish(_PORT)
    client, server = stack.enter_context(socket.create_connection(endpoint, timeout=_WAIT_S)), guest.accept()
    server.sendall(b"x")
    assert client.recv(1) == b"x"
    fake.hang_up()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert wait_until(lambda: _is_refused(endpoint), Deadline(_WAIT_S))


def test_what_a_client_sends_at_once_goes_with_the_opening(stack: ExitStack, served: Serve, fake: FakeAgent) -> None:
    fake.silent.add(StreamKind.CONNECT)
    relay = Relay(served, no_datagrams, ServiceThread)
    stack.callback(relay.close)
    client = stack.enter_context(socket.create_connection(relay.publish(_PORT), timeout=_WAIT_S))
    client.sendall(b"question")
    said = lambda: [b"".join(stream.inbox) for stream in fake.streams.values()]  # noqa: E731
    assert wait_until(lambda: fake.run(said) == [b"question"], Deadline(_WAIT_S)), fake.run(said)


def test_a_process_without_descriptors_accepts_connections_when_it_has_some_again(
    stack: ExitStack, served: Serve, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay(served, no_datagrams, ServiceThread)
    stack.callback(relay.close)
    endpoint = relay.publish(_PORT)
    lacking = iter((True, True))
    accept = Socket.accept

    def accept_or_not(listener: Socket) -> object:
        if next(lacking, False):
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(listener)

    monkeypatch.setattr(Socket, "accept", accept_or_not)
    client = stack.enter_context(socket.create_connection(endpoint, timeout=_WAIT_S))
    guest.accept().sendall(b"x")
    assert client.recv(1) == b"x"
    assert relay.fault == "a connection to guest port 80 waits: Too many open files"


def test_bytes_arrive_whole_in_order_and_both_ways_at_once(connect: Callable[[], socket.socket], guest: Guest) -> None:
    up, down = bytes(range(256)) * 16384, bytes(reversed(range(256))) * 16384  # 4 MiB each
    client, server = connect(), guest.accept()
    senders = [_start(_send_all, client, up), _start(_send_all, server, down)]
    got: dict[str, bytes] = {}
    reader = _start(lambda: got.update(server=_read_all(server)))
    got["client"] = _read_all(client)
    for thread in (*senders, reader):
        thread.join(_WAIT_S)
    assert got["server"] == up
    assert got["client"] == down


def test_fifty_connections_do_not_wait_for_each_other(connect: Callable[[], socket.socket], guest: Guest) -> None:
    pairs = [(connect(), guest.accept()) for _ in range(50)]
    for number, (client, server) in enumerate(reversed(pairs)):
        server.sendall(b"%d" % number)
        assert client.recv(10) == b"%d" % number
    for client, _ in pairs:
        client.close()
    for _, server in pairs:
        assert server.recv(1) == b""


def test_a_client_that_does_not_read_delays_no_other_connection(
    connect: Callable[[], socket.socket], guest: Guest
) -> None:
    lazy, flooding = connect(), guest.accept()
    flood = _start(_send_all, flooding, bytes(32 << 20))
    client, server = connect(), guest.accept()
    server.sendall(b"quick")
    assert client.recv(5) == b"quick"
    assert flood.is_alive()
    lazy.close()
    flood.join(_WAIT_S)
    assert not flood.is_alive()


@pytest.mark.parametrize("state", ["idle", "half-closed by the client", "half-closed by the guest", "not reading"])
def test_closing_ends_connections_in_every_state(
    state: str, relay: Relay, connect: Callable[[], socket.socket], guest: Guest
) -> None:
    client, server = connect(), guest.accept()
    if state == "half-closed by the client":
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
    elif state == "half-closed by the guest":
        server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    elif state == "not reading":
        flood = _start(_send_all, server, bytes(32 << 20))
        assert client.recv(1)
    relay.close()
    assert wait_until(lambda: not _relay_threads(), Deadline(_WAIT_S)), _relay_threads()
    with pytest.raises(BrokenPipeError if state == "half-closed by the guest" else ConnectionResetError):
        client.sendall(b"is anybody there?") if state == "half-closed by the guest" else _read_all(client)
    if state == "not reading":
        flood.join(_WAIT_S)
        assert not flood.is_alive()


def test_a_closed_relay_refuses_new_connections_and_ports(relay: Relay) -> None:
    endpoint: Endpoint = relay.publish(_PORT)
    relay.close()
    relay.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(endpoint, timeout=_WAIT_S)
    with pytest.raises(EngineError, match="the VM has ended"):
        relay.publish(_PORT)


def test_a_connection_that_was_being_made_when_the_relay_closed_is_reset(stack: ExitStack, guest: Guest) -> None:
    dialling, may_dial = threading.Event(), threading.Event()

    def dial_slowly(port: int) -> ByteStream:
        dialling.set()
        assert may_dial.wait(_WAIT_S)
        return guest.dial(port)

    relay = Relay(dialled(dial_slowly), no_datagrams, ServiceThread)
    client = stack.enter_context(socket.create_connection(relay.publish(_PORT), timeout=_WAIT_S))
    assert dialling.wait(_WAIT_S)
    relay.close()
    may_dial.set()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionResetError):
        guest.accept().recv(1)


def _receive(endpoint: Endpoint) -> bytes:
    """Connect and receive. On a busy host, the connection may be reset before `connect` returns."""
    with socket.create_connection(endpoint, timeout=_WAIT_S) as client:
        return client.recv(1)


def _is_refused(endpoint: Endpoint) -> bool:
    try:
        socket.create_connection(endpoint, timeout=_WAIT_S).close()
    except ConnectionRefusedError:
        return True
    return False


def _start(func: Callable[..., object], *arguments: object) -> threading.Thread:
    thread = threading.Thread(target=func, args=arguments, daemon=True)
    thread.start()
    return thread


def _send_all(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # some tests end the connection meanwhile
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def _read_all(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 16):
        parts.append(data)
    return b"".join(parts)
