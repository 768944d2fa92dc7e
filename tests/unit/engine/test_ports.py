from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pytest_fcvm.engine.qemu.monitor import Monitor
from pytest_fcvm.engine.qemu.ports import Forwards, parse_forwards
from pytest_fcvm.errors import EngineError, HostError
from pytest_fcvm.model.net import Endpoint, Proto, PublishedPort

TABLE = """Hub -1 (net0):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[ESTABLISHED]   19       127.0.0.1 40000       10.0.2.15    80     0     0
  TCP[HOST_FORWARD]  14       127.0.0.1 35601       10.0.2.15    80     0     0
  UDP[HOST_FORWARD]  15       127.0.0.7  5353       10.0.2.15    53     0     0
  TCP[HOST_FORWARD]  16               * 35602       10.0.2.15   443     0     0
"""


class Slirp:
    """The human monitor's side of slirp: a table of listeners, grown by hostfwd_add."""

    def __init__(self, qmp: Any) -> None:
        self.lines: list[str] = []
        self.refusal = ""
        self.asked: list[str] = []
        qmp.answers["human-monitor-command"] = self.answer

    def answer(self, _: str, arguments: Any) -> str:
        line = arguments["command-line"]
        self.asked.append(line)
        if line == "info usernet":
            return "Hub -1 (net0):\r\n" + "\r\n".join(self.lines) + "\r\n"
        if self.refusal:
            return self.refusal
        proto, host, ports = line.split()[2].split(":", 2)
        host_port, _, guest_port = ports.partition("-:")
        self.listen(proto.upper(), host, int(host_port) or 40000 + len(self.lines), int(guest_port))
        return ""

    def listen(self, proto: str, host: str, host_port: int, guest_port: int) -> None:
        self.lines.append(f"  {proto}[HOST_FORWARD]  14  {host} {host_port}  10.0.2.15  {guest_port}  0  0")


@pytest.fixture
def slirp(qmp: Any) -> Slirp:
    return Slirp(qmp)


def test_the_table_of_slirp_is_read_and_connections_in_it_are_no_listeners() -> None:
    assert parse_forwards(TABLE) == {
        (Proto.TCP, 80): Endpoint("127.0.0.1", 35601),
        (Proto.UDP, 53): Endpoint("127.0.0.7", 5353),
        (Proto.TCP, 443): Endpoint("127.0.0.1", 35602),
    }


def test_a_fixed_host_port_is_known_without_asking(qmp: Any, slirp: Slirp) -> None:
    forwards = Forwards(Monitor(qmp.client), [PublishedPort(guest_port=80, host_port=8080)])
    assert forwards.find(80, Proto.TCP) == ("127.0.0.1", 8080)
    assert slirp.asked == []


def test_free_ports_are_read_back_once_when_somebody_asks(qmp: Any, slirp: Slirp) -> None:
    slirp.listen("TCP", "127.0.0.1", 35601, 80)
    slirp.listen("UDP", "127.0.0.1", 35602, 80)
    both = [PublishedPort(guest_port=80), PublishedPort(guest_port=80, proto=Proto.UDP)]
    forwards = Forwards(Monitor(qmp.client), both)
    assert slirp.asked == []
    assert forwards.find(80, Proto.TCP) == ("127.0.0.1", 35601)
    assert forwards.find(80, Proto.UDP) == ("127.0.0.1", 35602)
    assert slirp.asked == ["info usernet"]


def test_a_port_that_nobody_published_has_no_endpoint(qmp: Any, slirp: Slirp) -> None:
    assert Forwards(Monitor(qmp.client), []).find(80, Proto.TCP) is None
    assert slirp.asked == []


def test_publishing_twice_gives_the_same_endpoint(qmp: Any, slirp: Slirp) -> None:
    forwards = Forwards(Monitor(qmp.client), [])
    first = forwards.add(PublishedPort(guest_port=81))
    assert forwards.add(PublishedPort(guest_port=81)) == first == ("127.0.0.1", 40000)
    assert slirp.asked == ["hostfwd_add net0 tcp:127.0.0.1:0-:81", "info usernet"]


def test_threads_that_publish_the_same_port_share_one_mapping(qmp: Any, slirp: Slirp) -> None:
    forwards = Forwards(Monitor(qmp.client), [])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: forwards.add(PublishedPort(guest_port=81)), range(16)))
    assert set(found) == {("127.0.0.1", 40000)}
    assert len(slirp.lines) == 1


def test_a_taken_host_port_is_named_with_the_reason(qmp: Any, slirp: Slirp) -> None:
    slirp.refusal = "could not set up host forwarding rule 'tcp:127.0.0.1:8080-:80'\r\n"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=rf"guest port 80 .* 127\.0\.0\.1:{port}/tcp: the port is taken"):
            Forwards(Monitor(qmp.client), []).add(PublishedPort(guest_port=80, host_port=port))


def test_a_mapping_that_does_not_show_up_is_an_engine_error(qmp: Any, slirp: Slirp) -> None:
    qmp.answers["human-monitor-command"] = lambda *_: ""
    with pytest.raises(EngineError, match="does not list it"):
        Forwards(Monitor(qmp.client), []).add(PublishedPort(guest_port=80))
