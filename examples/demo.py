#!/usr/bin/env python3
"""Run a pytest suite on real input: an nginx image, with a fresh clone for every test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).parent
_PUBLIC = "nginx:latest"
_REACHABLE_S = 15


def main() -> int:
    """Find or build the image, then run the suite twice. The second run finds the snapshot of the first."""
    image = _PUBLIC if _is_reachable(_PUBLIC) else _build()
    if image is None:
        return 1
    for run in ("first run: builds the snapshot", "second run: finds it"):
        print(f"\n== {run}\n", flush=True)
        command = [sys.executable, "-m", "pytest", "-v", str(_HERE / "nginx"), "--fcvm-image", image, "--fcvm-timings"]
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


def _is_reachable(image: str) -> bool:
    command = ["skopeo", "inspect", "--config", f"docker://{image}"]
    try:
        return subprocess.run(command, capture_output=True, timeout=_REACHABLE_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _build() -> str | None:
    print(f"{_PUBLIC} cannot be pulled: building nginx from the distribution's packages", flush=True)
    directory = Path(".demo")
    command = [sys.executable, str(_HERE / "images/build.py"), "nginx", str(directory)]
    return f"oci:{directory / 'nginx'}:latest" if subprocess.run(command, check=False).returncode == 0 else None


if __name__ == "__main__":
    sys.exit(main())
