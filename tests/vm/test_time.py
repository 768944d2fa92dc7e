"""The time of day in clones: it is the host's, however the clone was made, and never goes back."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from pytest_fcvm import Clone, Prepare, Snapshot, SnapshotFactory

WAIT_S = 30
SKEW_NS = 5_000_000
# For clones that resume at once on fewer CPUs: the answer and the time wait for a CPU, but not equally long.
CROWDED_NS = 20 * SKEW_NS
# Port 5400 returns the time, port 5401 by how many ns it has ever gone back.
# (clock_gettime is system call 228 of x86-64: the image has no module for it.)
PROGRAM = """
use IO::Socket::INET;
sub now {
    my $time = pack "qq", 0, 0;
    syscall 228, 0, $time;
    my ($s, $ns) = unpack "qq", $time;
    $s * 1_000_000_000 + $ns
}
if (fork) {
    my $server = IO::Socket::INET->new(LocalPort => 5400, Listen => 64, ReuseAddr => 1);
    while (my $client = $server->accept) { print $client now(); close $client }
}
my ($last, $back) = (now(), 0);
my $server = IO::Socket::INET->new(LocalPort => 5401, Listen => 64, ReuseAddr => 1, Timeout => 0.001);
while (1) {
    my $client = $server->accept;
    my $time = now();
    $back = $last - $time if $last - $time > $back;
    $last = $time;
    if ($client) { print $client $back; close $client }
}
"""


def start_clock(base: Clone) -> None:
    base.write_text("/srv/clock.pl", PROGRAM)
    base.succeed("perl /srv/clock.pl >/dev/null 2>&1 </dev/null & :")
    base.wait_until_succeeds("grep -q ':1518 .* 0A' /proc/net/tcp && grep -q ':1519 .* 0A' /proc/net/tcp")


@pytest.fixture
def snapshot(fcvm_snapshot_factory: SnapshotFactory) -> Iterator[Snapshot]:
    """A snapshot of a guest that returns the time."""
    return fcvm_snapshot_factory(prepare=Prepare(start_clock, version="1"))


def ask(clone: Clone, port: int) -> int:
    with socket.create_connection(clone.endpoint(port), timeout=WAIT_S) as client:
        return int(client.recv(100))


def check_time(clone: Clone, skew_ns: int = SKEW_NS) -> None:
    """Check that the guest's time is between the host's times before and after, give or take some milliseconds."""
    for _ in range(5):
        asked = time.time_ns()
        guest_ns = ask(clone, 5400)
        had = time.time_ns()
        assert asked - skew_ns <= guest_ns <= had + skew_ns, f"skew {(guest_ns - (asked + had) / 2) / 1e6:.1f} ms"


def test_every_kind_of_clone_has_the_hosts_time(snapshot: Snapshot) -> None:
    with snapshot.clone(name="named") as clone:  # made on demand
        check_time(clone)
        (fork,) = clone.fork()
        check_time(fork)
        check_time(clone)
        clone.reset()
        check_time(clone)
        clone.pause()
        time.sleep(0.5)
        clone.resume()
        check_time(clone)
    for _ in range(4):
        with snapshot.clone() as clone:  # from the pool, if there is one
            check_time(clone)


def test_six_clones_made_at_once_have_the_hosts_time(snapshot: Snapshot) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(6) as workers:
        clones = list(workers.map(lambda number: snapshot.clone(name=f"six-{number}"), range(6)))
        for clone in clones:
            stack.enter_context(clone)
        for clone in clones:
            check_time(clone, CROWDED_NS)


@pytest.mark.parametrize(
    "act",
    [lambda clone: (clone.pause(), clone.resume()), lambda clone: clone.snapshot().close()],
    ids=["pause", "snapshot"],
)
def test_the_time_never_goes_back(snapshot: Snapshot, act: Callable[[Clone], object]) -> None:
    with snapshot.clone() as clone:
        for _ in range(10):
            act(clone)
            time.sleep(0.02)
        assert ask(clone, 5401) == 0
