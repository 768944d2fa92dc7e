"""A guest without memory, files or processes left: the kernel refuses the one that wants more, and the clone lives."""

from __future__ import annotations

import httpx
import pytest

from pytest_fcvm import Clone
from pytest_fcvm.guest.process import GuestProcess

EAT = "for i in 1 2 3 4; do dd if=/dev/zero bs=80M count=1 2>/dev/null | sleep 30 & done; wait"
FILL = "dd if=/dev/zero of={} bs=1M 2>&1"
FILES = """mkdir "/many"; for (;;) { open(my $f, ">", "/many/" . $n++) or print("$!\n"), exit }"""
PROCESSES = """while (defined(my $p = fork)) { sleep(600), exit unless $p; $n++ } print "$!\n"; $|++; sleep 600"""


def _answers(clone: Clone) -> bool:
    return httpx.get(clone.url(80), timeout=60).status_code == 200


def test_a_command_without_enough_memory_ends_and_every_error_says_why(fcvm_clone: Clone) -> None:
    result = fcvm_clone.exec(EAT, timeout=240)
    assert "fcvm: the guest's memory ran out and its kernel killed " in result.stderr
    assert "mem=" in result.stderr
    assert _answers(fcvm_clone)
    metrics = fcvm_clone.metrics()
    assert int(metrics["workload_oom_kills"]) > 0
    assert "mem=" in str(metrics["memory"])
    assert "mem=" in fcvm_clone.evidence()["memory"]
    assert fcvm_clone.exec("true").stderr == ""  # the advice is not repeated for a later command


def test_file_systems_in_memory_fit_it_together(fcvm_clone: Clone) -> None:
    for path in ("/fill", "/dev/shm/fill", "/dev/fill"):
        assert "No space left on device" in fcvm_clone.exec(FILL.format(path), timeout=240).stdout
    assert _answers(fcvm_clone)
    metrics = fcvm_clone.metrics()
    assert metrics["overlay_used_bytes"] == metrics["overlay_size_bytes"]
    assert metrics["workload_oom_kills"] == 0


@pytest.mark.fcvm(mem="128M")
def test_memory_limits_the_number_of_empty_files(fcvm_clone: Clone) -> None:
    assert fcvm_clone.exec(["perl", "-e", FILES], timeout=600).stdout == "No space left on device\n"
    metrics = fcvm_clone.metrics()
    assert metrics["overlay_used_files"] == metrics["overlay_files"]
    assert metrics["workload_oom_kills"] == 0
    assert _answers(fcvm_clone)


@pytest.mark.fcvm(mem="128M")
def test_processes_end_before_memory_does_and_commands_still_run(fcvm_clone: Clone) -> None:
    with fcvm_clone.popen(["perl", "-e", PROCESSES]) as forking:
        _read_line(forking)
        assert fcvm_clone.exec(["echo", "alive"]).stdout == "alive\n"
        assert _answers(fcvm_clone)
    assert fcvm_clone.metrics()["workload_oom_kills"] == 0


def _read_line(process: GuestProcess) -> None:
    assert process.stdout.readline() == b"Resource temporarily unavailable\n"
