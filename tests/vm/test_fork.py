"""Snapshots and forks of a running clone, which runs on unaffected."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_fcvm import Clone, CloneFactory, FcvmError, Prepare
from tests.patience import PATIENCE
from tests.vm.cache import cache_of_this_run

COUNT = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
# A server that keeps its state only in memory: it counts its connections.
COUNTER = """
use IO::Socket::INET;
my $server = IO::Socket::INET->new(LocalPort => 5301, Listen => 9, ReuseAddr => 1) or die;
$| = 1; print "serving\n";
my $count = 0;
while (my $client = $server->accept()) { print $client ++$count; close $client; }
"""

pytestmark = pytest.mark.fcvm(command=["perl", "-e", COUNTER], ready="log:serving")


def count_of(clone: Clone) -> int:
    with socket.create_connection(clone.endpoint(5301), timeout=30) as connection:
        return int(connection.recv(64))


def copies_on_disk() -> list[Path]:
    return list((cache_of_this_run() / "snapshots").glob("copy-*"))


def test_forks_start_as_copies_of_the_clone_and_are_independent(fcvm_clone: Clone) -> None:
    assert [count_of(fcvm_clone) for _ in range(3)] == [1, 2, 3]
    fcvm_clone.write_text("/srv/note", "before")
    first, second = fcvm_clone.fork(2)
    fcvm_clone.write_text("/srv/note", "after")
    assert [count_of(fcvm_clone), count_of(first), count_of(first), count_of(second)] == [4, 4, 5, 4]
    assert [fork.read_text("/srv/note") for fork in (first, second)] == ["before", "before"]
    assert fcvm_clone.read_text("/srv/note") == "after"
    (again,) = first.fork()
    assert [count_of(again), count_of(first)] == [6, 6]


def test_no_two_forks_have_the_same_identity(fcvm_clone: Clone) -> None:
    vms = [fcvm_clone, *fcvm_clone.fork(3)]
    script = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; od -An -N8 -tx8 /dev/urandom"
    seen = [running.succeed(script).split() for running in vms]
    for values in zip(*seen, strict=True):
        assert len(set(values)) == len(vms)
    assert {running.succeed("hostname") for running in vms} == {"fcvm-base\n"}
    for running in vms:
        assert running.succeed(["getent", "hosts", running.name]).split()[0] == running.ip
    clocks = [float(running.succeed("date +%s.%N")) for running in vms]
    assert all(abs(clock - time.time()) < 30 for clock in clocks)


def test_the_clone_keeps_its_commands_streams_and_log(fcvm_clone: Clone) -> None:
    with fcvm_clone.popen(COUNT) as counter, fcvm_clone.popen(["cat"]) as typed:
        text = counter.stdout.read1()
        for _ in range(3):
            fcvm_clone.snapshot().close()
            text += counter.stdout.read1()
        typed.stdin.write(b"still here")
        typed.stdin.close()
        assert typed.stdout.read() == b"still here"
        lines = text.split()
        assert lines == [b"%d" % number for number in range(1, len(lines) + 1)]
    assert fcvm_clone.logs().count("serving") == 1
    assert abs(float(fcvm_clone.succeed("date +%s.%N")) - time.time()) < 30


def test_a_fork_has_the_clones_processes_and_log(fcvm_clone: Clone) -> None:
    with fcvm_clone.popen(f"{COUNT} >/tmp/counted") as counter:
        fcvm_clone.wait_until_succeeds("test -s /tmp/counted")
        (fork,) = fcvm_clone.fork()
        pid = counter.pid
    before = len(fork.read_text("/tmp/counted"))
    fork.wait_until_succeeds(f"test $(wc -c </tmp/counted) -gt {before}")  # the fork's own process runs on
    assert fork.succeed(f"tr '\\0' ' ' </proc/{pid}/cmdline").startswith("/bin/sh -c i=0")
    assert fork.logs().count("serving") == 1


def test_a_fork_can_attach_to_the_clones_command(fcvm_clone: Clone) -> None:
    script = "cat; echo input ended; read -r _ </tmp/go; echo told >&2; exit 5"
    fcvm_clone.succeed("mkfifo /tmp/go")
    with fcvm_clone.popen(script) as process:
        (fork,) = fcvm_clone.fork()
    attached = fork.attach(process.pid)
    assert attached.stdout.readline() == b"input ended\n"
    fork.succeed("echo > /tmp/go")
    assert attached.communicate(timeout_s=60 * PATIENCE) == (b"", b"told\n")
    assert attached.wait(60 * PATIENCE).code == 5
    with pytest.raises(FcvmError, match="process id"):
        fork.attach(process.pid)


def test_connections_of_a_test_stay_with_the_clone(fcvm_clone: Clone) -> None:
    with fcvm_clone.popen(["cat"]) as typed, _connected(fcvm_clone) as connection:
        typed.stdin.write(b"a")
        assert typed.stdout.read(1) == b"a"
        (fork,) = fcvm_clone.fork()
        connection.sendall(b"x")
        assert "ESTABLISHED" in _tcp_states(fcvm_clone, 5302)
        assert "ESTABLISHED" not in _tcp_states(fork, 5302)


@contextlib.contextmanager
def _connected(clone: Clone) -> Iterator[socket.socket]:
    """Connect to a server in the guest that keeps the connection."""
    serve = "use IO::Socket::INET; my $s = IO::Socket::INET->new(LocalPort => 5302, Listen => 1); $s->accept(); sleep"
    with clone.popen(["perl", "-e", f"{serve.replace('$s->accept()', 'my $c = $s->accept()')} 1000"]):
        clone.wait_until_succeeds("grep -q ':14B6 ' /proc/net/tcp")
        with socket.create_connection(clone.endpoint(5302), timeout=30) as connection:
            clone.wait_until_succeeds("grep ':14B6 ' /proc/net/tcp | grep -q ' 01 '")
            yield connection


def _tcp_states(clone: Clone, port: int) -> set[str]:
    names = {"01": "ESTABLISHED", "0A": "LISTEN"}
    lines = re.findall(rf"^ *\d+: \w+:{port:04X} \S+ (\w\w)", clone.succeed("cat /proc/net/tcp"), re.MULTILINE)
    return {names.get(state, state) for state in lines}


def test_a_snapshot_of_it_can_be_cloned_until_it_is_closed(fcvm_clone: Clone) -> None:
    count_of(fcvm_clone)
    before = copies_on_disk()
    with fcvm_clone.snapshot("counted") as snapshot:
        assert copies_on_disk() != before
        with snapshot.clone() as first, snapshot.clone(name="second") as second:
            assert first.name.startswith("counted-")
            assert [count_of(first), count_of(second)] == [2, 2]
            first.reset()
            assert count_of(first) == 2
    assert copies_on_disk() == before
    with pytest.raises(FcvmError):
        snapshot.clone()


def test_a_host_port_that_was_asked_for_stays_with_the_clone(fcvm_clone_factory: CloneFactory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        wanted = free.getsockname()[1]
    clone = fcvm_clone_factory(publish=f"{wanted}:5301")
    (fork,) = clone.fork()
    assert clone.port(5301) == wanted != fork.port(5301)
    assert count_of(clone) == count_of(fork) == 1


def test_copies_end_with_the_clone(fcvm_clone_factory: CloneFactory) -> None:
    before = copies_on_disk()
    clone = fcvm_clone_factory()
    (fork,) = clone.fork()
    clone.snapshot()
    clone.close()
    assert fork.closed
    assert copies_on_disk() == before


@pytest.mark.fcvm(disk="128M")
def test_a_fork_has_a_copy_of_the_disk(fcvm_clone: Clone) -> None:
    fcvm_clone.succeed("echo synced > /synced; sync; echo written > /written")
    (fork,) = fcvm_clone.fork()
    fcvm_clone.succeed("rm /synced /written; sync")
    assert fork.succeed("cat /synced /written") == "synced\nwritten\n"
    fork.succeed("echo own > /own; sync")
    assert fcvm_clone.fail("cat /own") == ""


@pytest.mark.fcvm(mem="1G", cpus=2)
def test_a_large_amount_of_changed_memory_is_copied(fcvm_clone: Clone) -> None:
    digest = fcvm_clone.succeed("head -c 300000000 /dev/urandom > /dev/shm/noise; md5sum </dev/shm/noise", timeout=300)
    (fork,) = fcvm_clone.fork()
    assert fork.succeed("md5sum </dev/shm/noise", timeout=300) == digest
    assert fcvm_clone.succeed("md5sum </dev/shm/noise", timeout=300) == digest


def test_a_full_channel_does_not_prevent_a_fork(fcvm_clone: Clone) -> None:
    with fcvm_clone.popen("yes") as unread, fcvm_clone.popen(f"{COUNT} | tee /tmp/counted") as counter:
        assert unread.stdout.read(2) == b"y\n"
        assert counter.stdout.readline() == b"1\n"
        time.sleep(1)  # `yes` has filled all buffers
        (fork,) = fcvm_clone.fork()
        assert count_of(fork) == count_of(fcvm_clone) == 1
        lines = [b"1", *counter.stdout.read1().split()]
        assert lines == [b"%d" % number for number in range(1, len(lines) + 1)]
        assert unread.stdout.read(200_000) == b"y\n" * 100_000


def flood(base: Clone) -> None:
    unread = base.popen("yes")
    assert unread.stdout.read(2) == b"y\n"
    time.sleep(1)


@pytest.mark.fcvm(command=["sh", "-c", "sleep 1; yes to the log"], ready="log:to the log", prepare=Prepare(flood))
def test_a_base_with_a_full_channel_can_be_snapshotted(fcvm_clone: Clone) -> None:
    assert fcvm_clone.succeed("echo awake") == "awake\n"


def test_a_paused_clone_says_what_to_do(fcvm_clone: Clone) -> None:
    fcvm_clone.pause()
    with pytest.raises(FcvmError, match="resume"):
        fcvm_clone.snapshot()
    fcvm_clone.resume()
    assert count_of(fcvm_clone.fork()[0]) == 1


def test_threads_may_copy_and_use_a_clone_at_once(fcvm_clone: Clone) -> None:
    with ThreadPoolExecutor(6) as pool:
        forks = [pool.submit(fcvm_clone.fork) for _ in range(3)]
        calls = [pool.submit(fcvm_clone.succeed, "echo used; sleep 0.1") for _ in range(9)]
        assert [call.result() for call in calls] == ["used\n"] * 9
        made = [fork.result()[0] for fork in forks]
    assert len({fork.name for fork in made}) == 3
    assert [count_of(fork) for fork in made] == [1, 1, 1]


def test_a_dead_clone_is_reported_and_leaves_no_copy(fcvm_clone: Clone) -> None:
    before = copies_on_disk()
    fcvm_clone.running.vm.kill()
    with pytest.raises(FcvmError):
        fcvm_clone.snapshot()
    assert copies_on_disk() == before
