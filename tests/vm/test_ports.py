"""The ports of a clone on the host: a clone's own address, IPv6, and taken port numbers."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pytest_fcvm import Clone, CloneFactory, VmSpec
from pytest_fcvm.host.clock import monotonic
from pytest_fcvm.model.parse import parse_network

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def status(url: str) -> int:
    with OPENER.open(url, timeout=60) as answer:
        return int(answer.status)


@pytest.mark.skipif(os.geteuid() != 0, reason="port 80 requires privileges")
@pytest.mark.parametrize("network", ["auto", "relay"])
def test_clones_at_their_own_addresses_all_serve_the_guests_port(
    fcvm_clone_factory: CloneFactory, fcvm_spec: VmSpec, network: str
) -> None:
    spec = fcvm_spec.merged({"network": parse_network(network), "own_address": True})
    clones = [fcvm_clone_factory(spec) for _ in range(3)]
    endpoints = [clone.endpoint(80) for clone in clones]
    assert [endpoint.port for endpoint in endpoints] == [80, 80, 80]
    assert len({endpoint.host for endpoint in endpoints}) == 3
    for clone in clones:
        clone.write_text("/var/www/html/index.html", clone.name)
    for clone in clones:
        with OPENER.open(clone.url(80), timeout=60) as answer:
            assert answer.read().decode() == clone.name
    clones[0].reset()
    assert clones[0].endpoint(80) == endpoints[0]
    assert status(clones[0].url(80)) == 200


@pytest.mark.parametrize("network", ["auto", "relay", "user,egress"])
def test_a_hundred_connections_at_once_are_all_served(
    fcvm_clone_factory: CloneFactory, fcvm_spec: VmSpec, network: str
) -> None:
    clone = fcvm_clone_factory(fcvm_spec.merged({"network": parse_network(network)}))
    endpoint, threads = clone.endpoint(80), threading.active_count()
    with ExitStack() as stack:
        started = monotonic()
        clients = [stack.enter_context(socket.create_connection(endpoint, timeout=60)) for _ in range(100)]
        assert monotonic() - started < 0.9, "one that was dropped is tried again after a second"
        for client in clients:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        for client in clients:
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        assert threading.active_count() <= threads + 5, "no thread for each connection"


def test_the_report_says_why_a_port_does_not_answer(fcvm_clone: Clone) -> None:
    with socket.create_connection(fcvm_clone.endpoint(81), timeout=60) as client, pytest.raises(ConnectionResetError):
        client.recv(1)
    reason = "a connection to guest port 81 was reset: nothing listens there on IPv4, or only on a loopback address"
    assert fcvm_clone.evidence()["ports"] == reason


def test_a_taken_port_number_is_replaced_with_a_warning(fcvm_clone_factory: CloneFactory) -> None:
    clone = fcvm_clone_factory(own_address=True)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.warns(UserWarning, match=rf"guest port {number}/tcp has another number .*: the port is taken"):
            host, port = clone.endpoint(number)
    assert host.startswith("127.")
    assert port != number


class Greeter(BaseHTTPRequestHandler):
    """Answer with the request's path, and the number of requests."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"hello {self.path}".encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def greeter() -> Iterator[int]:
    """The port of an HTTP server on the host's loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Greeter) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


def ask(clone: Clone, port: int, path: str) -> str:
    script = f"""
        use IO::Socket::INET;
        my $server = IO::Socket::INET->new("host.fcvm:{port}") or die "no way: $@";
        print $server "GET {path} HTTP/1.0\\r\\n\\r\\n";
        print <$server>;
    """
    result = clone.exec(["perl", "-e", script])
    return result.stdout + result.stderr


@pytest.mark.parametrize("network", ["auto", "relay"])
def test_a_guest_reaches_only_the_host_ports_that_it_was_given(
    fcvm_clone_factory: CloneFactory, fcvm_spec: VmSpec, greeter: int, network: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        closed = other.getsockname()[1]
        fields = {"host_ports": (greeter, 1), "network": parse_network(network)}
        clone = fcvm_clone_factory(fcvm_spec.merged(fields))
        assert "hello /one" in ask(clone, greeter, "/one")
        assert "hello /two" in ask(clone, greeter, "/two")
        assert "no way" in ask(clone, closed, "/")
        assert ask(clone, 1, "/") == ""  # nothing listens there on the host, so the connection is reset
        assert "host port 1 was reset: Connection refused" in clone.evidence()["host ports"]
        (fork,) = clone.fork()
        assert "hello /fork" in ask(fork, greeter, "/fork")
        assert "hello /still" in ask(clone, greeter, "/still")
        clone.reset()
        assert "hello /again" in ask(clone, greeter, "/again")


@pytest.mark.fcvm(publish=["[::1]:0:80"])
def test_a_port_at_an_ipv6_address(fcvm_clone: Clone) -> None:
    host, port = fcvm_clone.endpoint(80)
    assert host == "::1"
    assert fcvm_clone.url(80) == f"http://[::1]:{port}"
    assert status(fcvm_clone.url(80)) == 200
