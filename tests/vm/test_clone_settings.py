"""Settings of a clone that its snapshot does not depend on: clones of one snapshot each have their own."""

from __future__ import annotations

import time

import pytest

from pytest_fcvm import Clone, CloneFactory, FcvmError, Snapshot, SnapshotFactory


def test_clones_of_one_snapshot_each_have_their_own_ports(fcvm_snapshot_factory: SnapshotFactory) -> None:
    first, second = (fcvm_snapshot_factory(publish=f"0:{port}") for port in (8081, 8082))
    assert first.key == second.key
    for snapshot, wanted in ((first, 8081), (second, 8082)):
        with snapshot.clone() as clone:
            assert [port.guest_port for port in clone.spec.publish] == [wanted]
    assert fcvm_snapshot_factory(publish="0:8081") is first


@pytest.mark.fcvm(hook='echo "$(hostname) $COLOUR $(id -u)" > /srv/hooked', env={"COLOUR": "green"}, user="www-data")
@pytest.mark.fcvm(command=["sh", "-c", "while ! test -e /srv/hooked; do sleep 0.01; done; cat /srv/hooked; sleep 1000"])
@pytest.mark.fcvm(ready="agent")
def test_a_hook_runs_in_each_clone_before_its_workload_resumes(fcvm_snapshot: Snapshot) -> None:
    assert "green" not in fcvm_snapshot.logs()
    for _ in range(3):
        with fcvm_snapshot.clone() as clone:
            assert clone.read_text("/srv/hooked") == "fcvm-base green 0\n"
            clone.wait_for_log("fcvm-base green 0")


@pytest.mark.fcvm(hook="echo it cannot be >&2; exit 3")
def test_a_failing_hook_is_reported(fcvm_clone_factory: CloneFactory) -> None:
    with pytest.raises(FcvmError, match=r"hook ended with 3: it cannot be"):
        fcvm_clone_factory()


def _clock_of(clone: Clone) -> float:
    return float(clone.succeed("date +%s"))


@pytest.mark.fcvm(clock="snapshot", prepare="date -s '2020-02-29 12:00:00'")
def test_the_time_of_day_can_be_the_snapshots(fcvm_snapshot: Snapshot) -> None:
    then = 1582977600
    for _ in range(2):  # one from the pool
        with fcvm_snapshot.clone() as clone:
            assert 0 <= _clock_of(clone) - then < 600
            clone.pause()
            clone.resume()
            assert 0 <= _clock_of(clone) - then < 600
            (fork,) = clone.fork()
            assert 0 <= _clock_of(fork) - then < 600
            assert 0 <= _clock_of(clone) - then < 600


@pytest.mark.fcvm(prepare="date -s '2020-02-29 12:00:00'")
def test_the_time_of_day_is_the_hosts_by_default(fcvm_clone: Clone) -> None:
    assert abs(_clock_of(fcvm_clone) - time.time()) < 60
