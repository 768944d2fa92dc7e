#!/usr/bin/env python3
"""Run every tier of the tests, sum up, and fail at the end: one that fails does not keep the others from running.

tiers.py [TIER ...]
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_OLDEST = _ROOT / ".venv-oldest"
# On a shared machine, a test with a deadline may miss it once; a rerun is printed.
_RERUNS = ("--reruns", "2", "--reruns-delay", "1")
_PYTEST = (sys.executable, "-m", "pytest", *_RERUNS)
_STOCK = ("test_clone.py", "test_engine.py", "test_freeze.py", "test_kernel.py", "test_memory.py", "test_pool.py")
_NGINX = f"oci:{_ROOT / '.demo/nginx'}:latest"  # built by the suite
_PIP_INSTALL = ("-m", "pip", "install", "--quiet")


@dataclass(frozen=True)
class Tier:
    """Commands that run one after the other; the tier has failed with the first of them that fails."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    kernel: str = ""


TIERS = (
    Tier(
        "lint",
        (
            (sys.executable, "-m", "ruff", "check", "."),
            (sys.executable, "-m", "ruff", "format", "--check", "."),
            (sys.executable, "-m", "mypy"),
        ),
    ),
    Tier("kernel", (("make", "--no-print-directory", "kernel"),)),
    Tier("agent", ((sys.executable, "guest_image/build", "--arch", platform.machine()),)),
    Tier("suite", ((*_PYTEST, "tests"),)),
    Tier("stock kernel", ((*_PYTEST, *(f"tests/vm/{name}" for name in _STOCK)),), kernel="stock"),
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
            (
                str(_OLDEST / "bin/python"),
                "-m",
                "pytest",
                "examples",
                "--fcvm-image",
                _NGINX,
            ),
        ),
    ),
    Tier("packaging", ((sys.executable, "tests/packaging.py"),)),
)


def main(wanted: list[str]) -> int:
    """Run the tiers of these names, or all of them; return the exit code."""
    if unknown := set(wanted) - {tier.name for tier in TIERS}:
        print(f"no such tier: {', '.join(sorted(unknown))}; there are: {', '.join(tier.name for tier in TIERS)}")
        return 2
    results = [(tier.name, *_run(tier)) for tier in TIERS if not wanted or tier.name in wanted]
    print("\n== tiers")
    for name, passed, took_s in results:
        print(f"{name:16} {'passed' if passed else 'FAILED'} in {took_s:.0f} s")
    failed = sum(not passed for _, passed, _ in results)
    print(f"tiers: {len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _run(tier: Tier) -> tuple[bool, float]:
    print(f"\n== {tier.name}", flush=True)
    environment = dict(os.environ, FCVM_KERNEL=tier.kernel) if tier.kernel else None
    started = time.monotonic()
    passed = all(
        subprocess.run(command, cwd=_ROOT, env=environment, check=False).returncode == 0 for command in tier.commands
    )
    return passed, time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
