"""Prewarmed clones on real VMs: each has its own identity and the right time, and is replaced when it dies."""

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
    return "resume" in dict(clone.timeline.phases)


def _wait_for_a_paused_one(snapshot: Snapshot) -> int:
    """Wait until the pool has a paused clone, and return the process id of its VMM."""
    pool = snapshot.pool
    assert pool is not None
    assert wait_until(lambda: pool.ready and pool.ready[0].paused, Deadline(_PREWARM_S))
    return pool.ready[0].running.vm.pid


def _who(clone: Clone) -> tuple[str, ...]:
    script = "od -An -N16 -tx1 /dev/urandom; cat /etc/machine-id /proc/sys/kernel/random/boot_id; ip -o link"
    random, running, boot, *links = clone.succeed(script).splitlines()
    mac = next(line.split("link/ether ")[1].split()[0] for line in links if "eth0" in line)
    return random, running, boot, mac


@pytest.mark.fcvm(ready="http:80/")
def test_clones_from_the_pool_have_their_own_identity_and_the_hosts_time(fcvm_snapshot: Snapshot) -> None:
    seen: list[tuple[str, ...]] = []
    with fcvm_snapshot.clone() as first:  # made for this test, or prewarmed by an earlier one
        seen.append(_who(first))
    for _ in range(8):
        _wait_for_a_paused_one(fcvm_snapshot)
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


def test_a_clone_that_dies_in_the_pool_fails_no_test(fcvm_snapshot: Snapshot) -> None:
    with fcvm_snapshot.clone():
        lost = fcvm_snapshot.lost
        os.kill(_wait_for_a_paused_one(fcvm_snapshot), signal.SIGKILL)
        pool = fcvm_snapshot.pool
        assert pool is not None
        assert wait_until(lambda: pool.ready[0].running.ended is not None, Deadline(10 * PATIENCE))
        with fcvm_snapshot.clone() as clone:
            assert clone.succeed("echo alive") == "alive\n"
        assert fcvm_snapshot.lost == lost + 1


def test_a_paused_clone_uses_no_cpu(fcvm_snapshot: Snapshot) -> None:
    with fcvm_snapshot.clone() as clone:
        pid = _wait_for_a_paused_one(fcvm_snapshot)
        before = _ticks(pid)
        clone.succeed("sleep 2")
        assert _ticks(pid) - before <= 2


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
