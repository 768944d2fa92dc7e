"""No instruction of the workload runs in a clone before its identity is set."""

from __future__ import annotations

import re

import pytest

from pytest_fcvm import Snapshot
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.libc import real_time_ns
from tests.patience import PATIENCE

# Print as fast as possible: random bytes of the kernel, the time of day, and the identity.
SCRIPT = (
    'echo begun; while :; do echo "tick $(od -An -N8 -tx8 /dev/urandom) $(date +%s)'
    ' $(tail -n 1 /etc/hosts | cut -d" " -f 2) $(cat /etc/machine-id)"; done'
)
TICK = re.compile(r"tick +(\w+) (\d+) (\S+) (\w+)")


@pytest.mark.fcvm(command=["sh", "-c", SCRIPT], ready="log:tick")
def test_a_workload_sees_its_own_identity_from_the_start(fcvm_snapshot: Snapshot) -> None:
    base = {match[4] for match in TICK.finditer(fcvm_snapshot.logs())}
    assert len(base) == 1
    firsts = []
    started = real_time_ns() // 10**9  # clones may be prewarmed, but none before this
    for _ in range(8):
        with fcvm_snapshot.clone() as clone:
            assert wait_until(lambda clone=clone: clone.logs().count(f" {clone.name} ") > 3, Deadline(60 * PATIENCE))
            own = clone.logs()[len(fcvm_snapshot.logs()) :]
            # One line began before the snapshot and may have the base's values. No later line may.
            lines = [match.groups() for match in TICK.finditer(own)]
            whole = [line for line in lines if line[2] == clone.name][1:]
            assert lines[-len(whole) :] == whole
            assert all(int(second) >= started - 1 for _, second, _, _ in whole)
            assert base.isdisjoint(running for *_, running in whole)
            firsts.append({random for random, *_ in whole})
    assert len(set.union(*firsts)) == sum(map(len, firsts))
