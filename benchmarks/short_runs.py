#!/usr/bin/env python3
"""Run short pytest runs one after the other. Check that each passes, prints no complaint and leaves nothing behind.

    benchmarks/short_runs.py --runs 500 [--image IMAGE] [--keep DIRECTORY]

The runs alternate: with and without a pool, in one process and on two workers. All run in Python's development mode
with warnings as errors. A line for each kind of run goes to standard output. The exit code is 1 if a run was bad.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from itertools import cycle, islice
from pathlib import Path

from run import _build_image

_TESTS = """\
import urllib.request

import pytest


def test_answers(fcvm_clone):
    with urllib.request.urlopen(fcvm_clone.url(80), timeout=60) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("number", range(2))
def test_runs_a_command(fcvm_clone, number):
    assert fcvm_clone.exec(["true"]).exit_code == 0


def test_stays(fcvm_worker_clone):
    fcvm_worker_clone.succeed("true")
"""
_PASSED = "4 passed"
_KINDS = (
    ("pool 0", ("--fcvm-pool", "0")),
    ("pool auto", ("--fcvm-pool", "auto")),
    ("pool 0, -n 2", ("--fcvm-pool", "0", "-n", "2")),
    ("pool auto, -n 2", ("--fcvm-pool", "auto", "-n", "2")),
)
# A run that exits with 0 may still have printed these.
_COMPLAINT = re.compile(
    r"Traceback|Exception (ignored|in thread)|\w*Warning\b|INTERNALERROR|unraisable|unhandled|leaked", re.IGNORECASE
)
_RUN_S, _GONE_S = 600, 20


def main() -> int:
    """Make the runs, and print the bad ones."""
    arguments = _parse()
    image = arguments.image or f"oci:{_build_image()}:latest"
    took: dict[str, list[float]] = defaultdict(list)
    bad: dict[str, int] = defaultdict(int)
    # Socket paths have a length limit.
    with tempfile.TemporaryDirectory(prefix="fcvm-s-", dir="/tmp") as scratch:
        directory = Path(scratch)
        (directory / "test_short.py").write_text(_TESTS)
        (directory / "pytest.ini").write_text("[pytest]\n")
        for number, (kind, options) in enumerate(islice(cycle(_KINDS), arguments.runs), 1):
            started = time.monotonic()
            output, findings = _run(directory, ["--fcvm-image", image, *options])
            took[kind].append(time.monotonic() - started)
            if findings:
                bad[kind] += 1
                print(f"BAD: run {number} ({kind}): {'; '.join(findings)}", flush=True)
                if arguments.keep:
                    arguments.keep.mkdir(parents=True, exist_ok=True)
                    (arguments.keep / f"{number}.log").write_text(output)
    for kind, times in took.items():
        print(f"{kind:16} {len(times):4} runs, {bad[kind]} bad, median {statistics.median(times):.1f} s")
    print(f"{arguments.runs} runs, {sum(bad.values())} bad")
    return int(any(bad.values()))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="how many (default: 500)")
    parser.add_argument("--image", metavar="IMAGE", help="an image with a web server on port 80 (default: our nginx)")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="where the output of bad runs goes")
    return parser.parse_args()


def _run(directory: Path, options: list[str]) -> tuple[str, list[str]]:
    """Run the tests. Return the output and the failed checks."""
    runtime = directory / "run"
    runtime.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-W", "error", "-m", "pytest", "-W", "error", "-p", "no:asyncio", *options]
    # Unlike -X dev, this variable reaches the workers too.
    environment = {**os.environ, "PYTHONDEVMODE": "1", "XDG_RUNTIME_DIR": str(runtime)}
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_RUN_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return output.decode() if isinstance(output, bytes) else output, [f"no end after {_RUN_S} s"]
    findings = [f"exit code {done.returncode}"] if done.returncode else []
    if _PASSED not in done.stdout:
        findings.append(f"not {_PASSED}")
    if complaint := _COMPLAINT.search(done.stdout):
        findings.append(f"it printed {complaint[0]!r}")
    return done.stdout, findings + _wait_for_nothing(runtime)


def _wait_for_nothing(runtime: Path) -> list[str]:
    """Wait for the end of a run. Return what is left: files in its run directory, and processes that name it."""
    end = time.monotonic() + _GONE_S
    while (left := _left(runtime)) and time.monotonic() < end:
        time.sleep(0.05)
    return [f"left behind: {name}" for name in left]


def _left(runtime: Path) -> list[str]:
    # All runs of a user share the lock of --fcvm-max-clones.
    files = [str(path) for path in runtime.rglob("*") if path.is_file() and "admission" not in path.parts]
    directories = [str(path) for path in runtime.glob("fcvm/*") if path.is_dir() and path.name != "admission"]
    return files + directories + _processes(runtime)


def _processes(runtime: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            place = str((entry / "cwd").readlink())
        except OSError:
            continue
        if str(runtime) in command or place.startswith(str(runtime)):
            found.append(f"process {entry.name}: {command[:80]}")
    return found


if __name__ == "__main__":
    sys.exit(main())
