"""Run generated tests in a pytest process of their own, serially or on two workers, and read their durations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_fcvm.host.clock import monotonic

__all__ = ["CONFTEST", "SuiteFailed", "SuiteRun", "run_suite", "write_suite"]

_RUN_S = 900
_TESTS = """\
import urllib.request

import pytest

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))


@pytest.mark.parametrize("number", range({count}))
def test_home(number, fcvm_clone):
    assert OPENER.open(fcvm_clone.url(80), timeout=60).status == 200
"""
# Only the controller writes: it gets the reports of its workers.
CONFTEST = """\
import json
import os
from pathlib import Path


def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with Path("durations").open("a") as file:
            file.write(json.dumps([report.nodeid, report.when, report.duration, report.outcome]) + "\\n")
"""


class SuiteFailed(Exception):
    """The generated tests did not pass; the message has the end of pytest's output."""


@dataclass(frozen=True, kw_only=True)
class SuiteRun:
    """The durations of a run: `wall_ms` of the pytest process divided by the tests, and each test's phases in ms."""

    wall_ms: float
    setup_ms: list[float]
    teardown_ms: list[float]
    test_ms: list[float]


def write_suite(directory: Path, count: int) -> None:
    """Write `count` tests, each with its own clone and one GET, and the conftest that records durations."""
    directory.mkdir(parents=True)
    (directory / "pytest.ini").write_text("[pytest]\n")
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_nginx.py").write_text(_TESTS.format(count=count))


def run_suite(
    directory: Path, options: Sequence[str], count: int, workers: int, prefix: Sequence[str] = ()
) -> SuiteRun:
    """Run the file; `workers` 0 is pytest's own process, `prefix` goes before the command.

    Raise SuiteFailed unless all tests passed.
    """
    noted = directory / "durations"
    noted.unlink(missing_ok=True)
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += ["-n", str(workers)] if workers else []
    started = monotonic()
    done = subprocess.run(
        command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_RUN_S
    )
    wall_s = monotonic() - started
    if done.returncode:
        raise SuiteFailed((done.stdout + done.stderr)[-1500:])
    phases: dict[str, dict[str, float]] = {}
    for line in noted.read_text().splitlines():
        test, when, duration_s, _outcome = json.loads(line)
        phases.setdefault(test, {})[when] = duration_s * 1e3
    if len(phases) != count:
        raise SuiteFailed(f"{len(phases)} of {count} tests were reported")
    return SuiteRun(
        wall_ms=wall_s * 1e3 / count,
        setup_ms=[test["setup"] for test in phases.values()],
        teardown_ms=[test["teardown"] for test in phases.values()],
        test_ms=[sum(test.values()) for test in phases.values()],
    )
