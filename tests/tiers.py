#!/usr/bin/env python3
"""Run every tier of the tests, sum up, and fail at the end: one that fails does not keep the others from running.

    tiers.py [TIER ...]

Tiers that boot VMs run beside those that do not: emulation fills one CPU, and much of the rest is waiting.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_OLDEST = _ROOT / ".venv-oldest"
# On a shared machine, a test with a deadline may miss it once; a rerun is printed.
_RERUNS = ("--reruns", "2", "--reruns-delay", "1")
_PYTEST = (sys.executable, "-m", "pytest", *_RERUNS)
_STOCK = ("test_clone.py", "test_engine.py", "test_freeze.py", "test_kernel.py", "test_memory.py", "test_pool.py")
# Where rewinding matters: what a clone is, its end, the pool, copies, files, ports, and rewinding itself.
_REWOUND = (
    "test_rewind_vmm.py",
    "test_rewind.py",
    "test_clone.py",
    "test_lives.py",
    "test_pool.py",
    "test_fork.py",
    "test_files.py",
)
_QEMU = str(_ROOT / "guest_image/vmm/pytest_fcvm_qemu_x86_64/qemu-system-x86_64")
_NGINX = f"oci:{_ROOT / '.demo/nginx'}:latest"
_PIP_INSTALL = ("-m", "pip", "install", "--quiet")


@dataclass(frozen=True)
class Tier:
    """Commands that run one after the other; the tier has failed with the first of them that fails.

    Tiers of one `lane` run one after the other. Those without a lane come before all others.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    lane: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a tier went."""

    name: str
    passed: bool
    took_s: float


TIERS = (
    Tier(
        "lint",
        (
            (sys.executable, "-m", "ruff", "check", "."),
            (sys.executable, "-m", "ruff", "format", "--check", "."),
            (sys.executable, "-m", "mypy"),
        ),
    ),
    Tier("agent", ((sys.executable, "guest_image/build", "--arch", platform.machine()),)),
    Tier("kernel", (("make", "--no-print-directory", "kernel"),), lane="VMs"),
    Tier("vm", ((*_PYTEST, "tests/vm"),), lane="VMs"),
    Tier(
        "stock kernel",
        ((*_PYTEST, *(f"tests/vm/{name}" for name in _STOCK)),),
        lane="VMs",
        environment={"FCVM_KERNEL": "stock"},
    ),
    Tier("suite", ((*_PYTEST, "tests", "--ignore=tests/vm"),), lane="others"),
    Tier(
        "oldest versions",
        (
            (sys.executable, "-m", "venv", "--clear", str(_OLDEST)),
            (
                str(_OLDEST / "bin/python"),
                *_PIP_INSTALL,
                "--constraint",
                "tests/oldest.txt",
                "--editable",
                ".[xdist]",
                "pytest-timeout",
                "pytest-rerunfailures",
            ),
            (str(_OLDEST / "bin/python"), "-m", "pytest", *_RERUNS, "tests/plugin"),
            (sys.executable, "examples/images/build.py", "nginx", ".demo"),
            (
                str(_OLDEST / "bin/python"),
                "-m",
                "pytest",
                "examples",
                "--fcvm-image",
                _NGINX,
            ),
        ),
        lane="others",
    ),
    Tier("packaging", ((sys.executable, "tests/packaging.py"),), lane="others"),
    Tier(
        "own QEMU",
        (
            (sys.executable, "guest_image/vmm/build"),
            (*_PYTEST, *(f"tests/vm/{name}" for name in _REWOUND)),
            (sys.executable, "benchmarks/run.py", "--rounds", "1", "--qemu", _QEMU),  # whether it runs
        ),
        lane="others",
        environment={"FCVM_QEMU": _QEMU, "FCVM_TEST_QEMU": _QEMU},
    ),
)
_WIDTH = max(len(tier.name) for tier in TIERS)
_printing = threading.Lock()


def main(wanted: list[str]) -> int:
    """Run the tiers of these names, or all of them; return the exit code."""
    if unknown := set(wanted) - {tier.name for tier in TIERS}:
        print(f"no such tier: {', '.join(sorted(unknown))}; there are: {', '.join(tier.name for tier in TIERS)}")
        return 2
    chosen = [tier for tier in TIERS if not wanted or tier.name in wanted]
    lanes: dict[str, list[Tier]] = {"": []}
    for tier in chosen:
        lanes.setdefault(tier.lane, []).append(tier)
    results = _run_lane(lanes.pop(""))
    with ThreadPoolExecutor(max_workers=max(1, len(lanes))) as workers:
        results += [result for lane in workers.map(_run_lane, lanes.values()) for result in lane]
    print("\n== tiers")
    for result in results:
        print(f"{result.name:{_WIDTH}} {'passed' if result.passed else 'FAILED'} in {result.took_s:.0f} s")
    failed = sum(not result.passed for result in results)
    print(f"tiers: {len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _run_lane(tiers: list[Tier]) -> list[Result]:
    return [_run(tier) for tier in tiers]


def _run(tier: Tier) -> Result:
    started = time.monotonic()
    passed = all(_run_command(tier, command) for command in tier.commands)
    took_s = time.monotonic() - started
    _say(tier, f"== {'passed' if passed else 'FAILED'} in {took_s:.0f} s")
    return Result(name=tier.name, passed=passed, took_s=took_s)


def _run_command(tier: Tier, command: tuple[str, ...]) -> bool:
    """Run a command, whose lines are shown with the tier's name, and say whether it succeeded."""
    process = subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**os.environ, **tier.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    with process:
        assert process.stdout
        for line in process.stdout:
            _say(tier, line.rstrip("\n"))
    return process.returncode == 0


def _say(tier: Tier, line: str) -> None:
    with _printing:
        print(f"{tier.name:{_WIDTH}} | {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
