"""The relay between TCP clients of the host and byte streams into a guest, here sockets of a server in this process."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from pytest_fcvm.errors import EngineError, GuestError, HostError
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.threads import ServiceThread
from pytest_fcvm.model.net import Endpoint, PublishedPort
from pytest_fcvm.net.datagrams import DatagramStream
from pytest_fcvm.net.relay import ByteStream, Relay

_PORT = PublishedPort(guest_port=80)
_WAIT_S = 20


class SocketStream:
    """A byte stream into the guest over a TCP socket, with the manners of the agent's."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, timeout=_WAIT_S)

    def recv(self, size: int) -> bytes:
        return self.sock.recv(size)

    def sendall(self, data: bytes) -> None:
        self.sock.sendall(data)

    def shutdown_write(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        with suppress(OSError):  # closed before
            _arm_reset(self.sock)
            self.sock.shutdown(socket.SHUT_RD)  # wakes a reader, as the session does
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class Guest:
    """A server of the guest: hands out what connects to it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        self._listener.settimeout(_WAIT_S)
        self.address = self._listener.getsockname()

    def dial(self, _port: int) -> ByteStream:
        return SocketStream(self.address)

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


@pytest.fixture
def relay(stack: ExitStack, guest: Guest) -> Relay:
    """A relay to it."""
    relay = Relay(guest.dial, no_datagrams, ServiceThread)
    stack.callback(relay.close)
    return relay


@pytest.fixture
def connect(stack: ExitStack, relay: Relay) -> Callable[[], socket.socket]:
    """Connect to the relayed port."""
    return lambda: stack.enter_context(socket.create_connection(relay.publish(_PORT), timeout=_WAIT_S))


def test_a_port_is_published_on_loopback_and_stays_where_it_is(relay: Relay) -> None:
    first = relay.publish(_PORT)
    assert (first.host, first.port > 0) == ("127.0.0.1", True)
    assert relay.publish(_PORT) == first
    assert relay.publish(PublishedPort(guest_port=81)).port != first.port


def test_a_taken_host_port_is_named_with_what_to_do(relay: Relay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError) as caught:
            relay.publish(PublishedPort(guest_port=80, host_port=port))
    assert caught.value.message == f"127.0.0.1:{port} cannot be listened on: Address already in use"
    assert caught.value.hint == "publish another host port, or 0 for any free one"


def test_a_client_that_has_said_all_still_hears_the_answer(connect: Callable[[], socket.socket], guest: Guest) -> None:
    client, server = connect(), guest.accept()
    client.sendall(b"question")
    client.shutdown(socket.SHUT_WR)
    assert _read_all(server) == b"question"
    server.sendall(b"answer")
    server.close()
    assert _read_all(client) == b"answer"


def test_a_guest_that_has_said_all_still_hears_the_client(connect: Callable[[], socket.socket], guest: Guest) -> None:
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
    _arm_reset(client)
    client.close()
    with pytest.raises(ConnectionResetError):
        server.recv(1)


def test_a_port_is_at_one_address_until_another_is_named(stack: ExitStack, guest: Guest) -> None:
    relay = Relay(guest.dial, no_datagrams, ServiceThread)
    stack.callback(relay.close)
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

    relay = Relay(refuse, no_datagrams, ServiceThread)
    stack.callback(relay.close)
    endpoint = relay.publish(_PORT)

    def receive() -> None:
        stack.enter_context(socket.create_connection(endpoint, timeout=_WAIT_S)).recv(1)

    with pytest.raises(ConnectionResetError):  # on a busy machine by the time that it is connected
        receive()
    refused = isinstance(error, ConnectionRefusedError)
    assert relay.fault == ("" if refused else f"a connection to guest port 80 was reset: {error}")


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


def test_a_client_that_does_not_read_holds_up_nobody_else(connect: Callable[[], socket.socket], guest: Guest) -> None:
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
    with pytest.raises(EngineError, match="is gone"):
        relay.publish(_PORT)


def test_a_connection_that_was_being_made_when_the_relay_closed_is_reset(stack: ExitStack, guest: Guest) -> None:
    dialling, go_on = threading.Event(), threading.Event()

    def dial_slowly(port: int) -> ByteStream:
        dialling.set()
        assert go_on.wait(_WAIT_S)
        return guest.dial(port)

    relay = Relay(dial_slowly, no_datagrams, ServiceThread)
    client = stack.enter_context(socket.create_connection(relay.publish(_PORT), timeout=_WAIT_S))
    assert dialling.wait(_WAIT_S)
    relay.close()
    go_on.set()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with pytest.raises(ConnectionResetError):
        guest.accept().recv(1)


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
