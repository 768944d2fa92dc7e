"""A booted base, a restored clone and a rewound clone behave the same."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_fcvm import Clone, Prepare, Snapshot, SnapshotFactory
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.snapshot import OpenSnapshot
from tests.patience import PATIENCE

WAIT_S = 60.0 * PATIENCE
# Answer every datagram and every connection on a port with the bytes and the sender.
UDP_ECHO = """
use IO::Socket::INET;
my $socket = IO::Socket::INET->new(LocalPort => 5300, Proto => 'udp') or die;
while (1) { my $peer = $socket->recv(my $data, 65535); $socket->send($data, 0, $peer); }
"""
TCP_PEER = """
use IO::Socket::INET;
my $server = IO::Socket::INET->new(LocalPort => 5301, Listen => 9, ReuseAddr => 1) or die;
while (my $client = $server->accept()) {
  my $said = '';
  while (my $got = sysread($client, my $data, 65536)) { $said .= $data; }
  print $client length($said), ' bytes from ', $client->peerhost;
  close $client;
}
"""


def commands_have_streams_and_exit_codes(running: Clone) -> None:
    result = running.exec(["sh", "-c", "cat; echo error >&2; exit 7"], stdin="typed")
    assert (result.stdout, result.stderr, result.exit_code) == ("typed", "error\n", 7)
    killed = running.exec("kill -TERM $$")
    assert killed.exit_code == 128 + 15


def commands_have_the_environment_directory_and_user_they_are_given(running: Clone) -> None:
    result = running.exec("echo $COLOUR; pwd; id -un", env={"COLOUR": "green"}, cwd="/var/log", user="www-data")
    assert result.stdout.split() == ["green", "/var/log", "www-data"]


def large_streams_are_whole(running: Clone) -> None:
    size = 3 << 20
    assert running.exec("wc -c", stdin=b"x" * size).stdout.strip() == str(size)
    assert len(running.exec(f"head -c {size} /dev/zero").stdout_bytes) == size


def files_go_in_and_out(running: Clone) -> None:
    running.write_text("/srv/greeting", "grüß dich")
    assert running.read_text("/srv/greeting") == "grüß dich"
    running.copy_in(Path(__file__), "/srv/")
    digest = hashlib.md5(Path(__file__).read_bytes()).hexdigest()
    assert digest in running.succeed(f"md5sum /srv/{Path(__file__).name}")


def the_service_answers_on_a_host_port(running: Clone) -> None:
    assert running.http(80).get("/").status_code == 200
    assert running.port(80) == running.port(80)


def a_port_without_a_service_says_nothing(running: Clone) -> None:
    with (
        socket.create_connection(running.endpoint(4), timeout=WAIT_S) as client,
        contextlib.suppress(ConnectionResetError),  # a forwarder may end it in either way
    ):
        assert client.recv(1) == b""


def a_half_close_is_kept_and_the_peer_is_the_gateway(running: Clone) -> None:
    with running.popen(["perl", "-e", TCP_PEER]):
        running.wait_until_succeeds("grep -q ':14B5 00000000:0000 0A' /proc/net/tcp")
        with socket.create_connection(running.endpoint(5301), timeout=WAIT_S) as client:
            client.sendall(b"x" * (1 << 20))
            client.shutdown(socket.SHUT_WR)
            said = b""
            while data := client.recv(100):
                said += data
    assert said == b"1048576 bytes from 10.0.2.2"


def datagrams_come_back(running: Clone) -> None:
    with (
        running.popen(["perl", "-e", UDP_ECHO]),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        running.wait_until_succeeds("grep -q ':14B4 ' /proc/net/udp")
        client.connect(running.endpoint(5300, "udp"))
        client.settimeout(1)
        for data in (b"one", b"x" * 1400, b""):

            def is_echoed(data: bytes = data) -> bool:
                client.send(data)  # the network may lose one
                try:
                    return client.recv(65535) == data
                except TimeoutError:
                    return False

            assert wait_until(is_echoed, Deadline(WAIT_S)), data


def logs_are_followed(running: Clone) -> None:
    mark = f"/{time.monotonic_ns()}"
    running.http(80).get(mark)
    running.wait_for_log(f"GET {mark}")


def the_guests_memory_is_counted(running: Clone) -> None:
    metrics = running.metrics()
    assert 100 << 20 < float(metrics["memory_available_bytes"]) < float(metrics["memory_total_bytes"]) < 256 << 20


BEHAVIOURS: Mapping[str, Callable[[Clone], None]] = {
    func.__name__: func
    for func in (
        commands_have_streams_and_exit_codes,
        commands_have_the_environment_directory_and_user_they_are_given,
        large_streams_are_whole,
        files_go_in_and_out,
        the_service_answers_on_a_host_port,
        a_port_without_a_service_says_nothing,
        a_half_close_is_kept_and_the_peer_is_the_gateway,
        datagrams_come_back,
        logs_are_followed,
        the_guests_memory_is_counted,
    )
}


@pytest.fixture(scope="module")
def seen_in_a_base(fcvm_snapshot_factory: SnapshotFactory) -> dict[str, Exception | None]:
    """What each behaviour raised in a base, in its prepare function."""
    seen: dict[str, Exception | None] = {}

    def prepare(base: Clone) -> None:
        for name, behaviour in BEHAVIOURS.items():
            try:
                behaviour(base)
            except (Exception, AssertionError) as error:  # noqa: BLE001  the test of that name raises it
                seen[name] = error
            else:
                seen[name] = None

    fcvm_snapshot_factory(prepare=Prepare(prepare, version=str(time.time_ns())))  # never in the cache
    return seen


@pytest.mark.parametrize("name", list(BEHAVIOURS))
def test_a_base_that_has_booted(seen_in_a_base: dict[str, Exception | None], name: str) -> None:
    error = seen_in_a_base[name]
    if error is not None:
        raise error


@pytest.mark.parametrize("name", list(BEHAVIOURS))
def test_a_clone_that_was_restored(fcvm_clone: Clone, name: str) -> None:
    BEHAVIOURS[name](fcvm_clone)


@pytest.mark.parametrize("name", list(BEHAVIOURS))
def test_a_clone_that_was_rewound(fcvm_snapshot: Snapshot, name: str) -> None:
    assert isinstance(fcvm_snapshot, OpenSnapshot)
    if not fcvm_snapshot.inputs.report.rewinds:
        pytest.skip("this engine cannot rewind: run `make qemu`")
    with fcvm_snapshot.clone(name="former") as former:
        BEHAVIOURS[name](former)
    with fcvm_snapshot.clone(name="rewound") as clone:
        assert "rewind" in dict(clone.timeline.phases)
        BEHAVIOURS[name](clone)


def test_eight_clones_made_at_once_all_answer(fcvm_snapshot: Snapshot) -> None:
    def look(_: int) -> str:
        with fcvm_snapshot.clone() as clone:
            assert clone.http(80).get("/").status_code == 200
            return clone.succeed("cat /etc/machine-id")

    with ThreadPoolExecutor(8) as workers:
        assert len(set(workers.map(look, range(8)))) == 8
