"""Large amounts of data: nothing stalls, and no byte is lost that a reader waits for."""

from __future__ import annotations

import hashlib
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest

from pytest_fcvm import Clone
from tests.patience import PATIENCE


def test_a_command_may_print_200_mb(fcvm_clone: Clone) -> None:
    with fcvm_clone.popen(["head", "-c", "200000000", "/dev/zero"]) as process:
        total = 0
        while chunk := process.stdout.read(1 << 20):
            total += len(chunk)
        assert total == 200_000_000
        assert process.wait(60 * PATIENCE).code == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20  # KiB


def test_fifty_megabytes_of_stdin_arrive_whole(fcvm_clone: Clone) -> None:
    data = os.urandom(1 << 20) * 50
    result = fcvm_clone.exec(["sha256sum"], stdin=data, timeout=300)
    assert result.stdout.split()[0] == hashlib.sha256(data).hexdigest()


def test_five_hundred_commands_at_once(fcvm_clone: Clone) -> None:
    with ThreadPoolExecutor(100) as pool:
        results = list(pool.map(lambda n: fcvm_clone.exec(["echo", str(n)], timeout=300), range(500)))
    assert [int(result.stdout) for result in results] == list(range(500))


def test_a_reader_that_does_not_read_stalls_no_other(fcvm_clone: Clone) -> None:
    stalled = fcvm_clone.popen(["cat", "/dev/zero"])
    try:
        for _ in range(20):
            assert fcvm_clone.exec(["echo", "still here"]).stdout == "still here\n"
    finally:
        stalled.close()


TALKATIVE = (
    "echo begun; while [ ! -e /tmp/go ]; do sleep 0.1; done; head -c 50000000 /dev/zero | tr '\\0' x | fold -w 999; "
    "echo; echo all said; sleep 1000"
)


@pytest.mark.fcvm(command=["sh", "-c", TALKATIVE], ready="log:begun")
def test_a_workload_may_log_50_mb(fcvm_clone: Clone) -> None:
    fcvm_clone.succeed("touch /tmp/go")
    fcvm_clone.wait_for_log("^all said", timeout=300)
    assert fcvm_clone.logs().count("x") == 50_000_000
