"""The relay's UDP ports. The guest's end is two queues: what it has received, and what it answers."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pytest_fcvm.errors import GuestTimeout, HostError
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.threads import ServiceThread
from pytest_fcvm.model.net import Proto, PublishedPort
from pytest_fcvm.network.ports.datagrams import DatagramPort

_WAIT_S = 20
_DNS = PublishedPort(guest_port=53, proto=Proto.UDP)


class Peer:
    """A stream of datagrams as the guest's service sees it."""

    def __init__(self) -> None:
        self.got: queue.Queue[bytes] = queue.Queue()
        self._answers: queue.Queue[bytes | None] = queue.Queue()
        self.closed = threading.Event()

    def recv(self, timeout_s: float) -> bytes | None:
        try:
            return self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise GuestTimeout("no datagram") from None

    def send(self, data: bytes) -> None:
        self.got.put(data)

    def close(self) -> None:
        self.closed.set()
        self._answers.put(None)

    def answer(self, data: bytes) -> None:
        self._answers.put(data)


class Bench:
    """A port, the streams that it has opened, and clients of it."""

    def __init__(self, stack: ExitStack, idle_s: float = 60) -> None:
        self.peers: list[Peer] = []
        self.port = DatagramPort(_DNS, self._dial, ServiceThread, idle_s)
        self.refuses_next = False
        self._stack = stack
        stack.callback(self.port.close)

    def client(self) -> socket.socket:
        client = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        client.settimeout(_WAIT_S)
        client.connect(self.port.endpoint)
        return client

    def _dial(self, port: int) -> Peer:
        assert port == 53
        if self.refuses_next:
            self.refuses_next = False
            raise ConnectionRefusedError
        self.peers.append(Peer())
        return self.peers[-1]


@pytest.fixture
def make_bench() -> Iterator[Callable[..., Bench]]:
    """Return a function that makes benches. Afterwards none of their threads may live."""
    with ExitStack() as stack:
        yield lambda **options: Bench(stack, **options)
    ours = lambda: [thread for thread in threading.enumerate() if thread.name == "fcvm-relay"]  # noqa: E731
    assert wait_until(lambda: not ours(), Deadline(_WAIT_S)), ours()


@pytest.mark.parametrize("size", [0, 1, 65507])
def test_a_datagram_arrives_whole_both_ways(make_bench: Callable[..., Bench], size: int) -> None:
    bench = make_bench()
    client, data = bench.client(), b"\0" * size
    client.send(data)
    assert wait_until(lambda: bench.peers, Deadline(_WAIT_S))
    assert bench.peers[0].got.get(timeout=_WAIT_S) == data
    bench.peers[0].answer(data)
    assert client.recv(65535) == data


def test_every_client_has_a_stream_and_its_own_answers(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    clients = [bench.client() for _ in range(3)]
    for number, client in enumerate(clients):
        client.send(b"question %d" % number)
        client.send(b"another %d" % number)
    assert wait_until(lambda: len(bench.peers) == 3, Deadline(_WAIT_S))
    for peer in bench.peers:
        peer.answer(peer.got.get(timeout=_WAIT_S).replace(b"question", b"answer"))
    assert [client.recv(100) for client in clients] == [b"answer 0", b"answer 1", b"answer 2"]
    assert len(bench.peers) == 3


def test_an_idle_client_loses_its_stream_and_gets_a_new_one(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(idle_s=0.2)
    client = bench.client()
    client.send(b"one")
    assert wait_until(lambda: bench.peers, Deadline(_WAIT_S))
    assert bench.peers[0].closed.wait(_WAIT_S)
    client.send(b"two")
    assert wait_until(lambda: len(bench.peers) == 2, Deadline(_WAIT_S))
    assert bench.peers[1].got.get(timeout=_WAIT_S) == b"two"


def test_a_guest_that_refuses_loses_a_datagram_and_not_the_port(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    client, bench.refuses_next = bench.client(), True
    client.send(b"lost")
    assert wait_until(lambda: not bench.refuses_next, Deadline(_WAIT_S))
    client.send(b"arrives")
    assert wait_until(lambda: bench.peers, Deadline(_WAIT_S))
    assert bench.peers[0].got.get(timeout=_WAIT_S) == b"arrives"


def test_close_ends_all_streams(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    bench.client().send(b"hello")
    assert wait_until(lambda: bench.peers, Deadline(_WAIT_S))
    bench.port.close()
    assert bench.peers[0].closed.wait(_WAIT_S)


def test_a_taken_host_port_is_named(make_bench: Callable[..., Bench]) -> None:
    taken = make_bench().port.endpoint.port
    with pytest.raises(
        HostError, match=f"guest port 53 cannot be published on 127.0.0.1:{taken}/udp: Address already in use"
    ):
        DatagramPort(PublishedPort(guest_port=53, host_port=taken, proto=Proto.UDP), lambda _: Peer(), ServiceThread)
