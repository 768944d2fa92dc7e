"""Clones ahead of the tests, on real VMs: each is somebody of its own, in time, and replaced when it dies."""

from __future__ import annotations

import os
import signal
import urllib.request
from pathlib import Path

import pytest

from pytest_fcvm import Clone, Snapshot
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.libc import real_time_ns
from tests.patience import PATIENCE

_PREWARM_S = 60 * PATIENCE


def _came_from_the_pool(clone: Clone) -> bool:
    return "wake" in dict(clone.timeline.phases)


def _wait_for_one_asleep(snapshot: Snapshot) -> int:
    """Wait until a clone sleeps in the pool and return the process id of its VMM."""
    pool = snapshot._pool
    assert pool is not None
    assert wait_until(lambda: pool._ready and pool._ready[0].paused, Deadline(_PREWARM_S))
    return pool._ready[0].running.vm.pid


def _who(clone: Clone) -> tuple[str, ...]:
    script = "od -An -N16 -tx1 /dev/urandom; cat /etc/machine-id /proc/sys/kernel/random/boot_id; ip -o link"
    random, running, boot, *links = clone.succeed(script).splitlines()
    mac = next(line.split("link/ether ")[1].split()[0] for line in links if "eth0" in line)
    return random, running, boot, mac


@pytest.mark.fcvm(ready="http:80/")
def test_clones_from_the_pool_are_somebody_of_their_own_and_know_the_time(fcvm_snapshot: Snapshot) -> None:
    seen: list[tuple[str, ...]] = []
    with fcvm_snapshot.clone() as first:  # made for this test, or ahead of it by one before
        seen.append(_who(first))
    for _ in range(8):
        _wait_for_one_asleep(fcvm_snapshot)
        with fcvm_snapshot.clone() as clone:
            assert _came_from_the_pool(clone)
            guest_ns, host_ns = int(clone.succeed("date +%s%N")), real_time_ns()
            assert abs(guest_ns - host_ns) < 2e9
            with urllib.request.urlopen(clone.url(80), timeout=20) as answer:
                assert answer.status == 200
            seen.append(_who(clone))
            assert clone.succeed(["getent", "hosts", clone.name]).split()[0] == clone.ip
    for values in zip(*seen, strict=True):
        assert len(set(values)) == len(seen), values


def test_a_clone_that_dies_in_the_pool_costs_no_test(fcvm_snapshot: Snapshot) -> None:
    with fcvm_snapshot.clone():
        lost = fcvm_snapshot.lost
        os.kill(_wait_for_one_asleep(fcvm_snapshot), signal.SIGKILL)
        pool = fcvm_snapshot._pool
        assert pool is not None
        assert wait_until(lambda: pool._ready[0].running.ended is not None, Deadline(10 * PATIENCE))
        with fcvm_snapshot.clone() as clone:
            assert clone.succeed("echo alive") == "alive\n"
        assert fcvm_snapshot.lost == lost + 1


def test_what_sleeps_takes_no_processor(fcvm_snapshot: Snapshot) -> None:
    with fcvm_snapshot.clone() as clone:
        pid = _wait_for_one_asleep(fcvm_snapshot)
        before = _ticks(pid)
        clone.succeed("sleep 2")
        assert _ticks(pid) - before <= 2


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
