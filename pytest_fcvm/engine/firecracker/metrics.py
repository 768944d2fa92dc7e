"""Firecracker's own metrics (its docs/metrics.md): a file with a JSON object on each line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from pytest_fcvm.host.files import read_regular

__all__ = ["METRICS_FILE", "read_latencies"]

METRICS_FILE = "metrics.json"


def read_latencies(path: Path) -> dict[str, float]:
    """Return the latencies in the newest line, in ms by Firecracker's names (`load_snapshot`).

    Return nothing for a file that is missing or incomplete.
    """
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        newest = json.loads(read_regular(path).splitlines()[-1])
        return {name: took / 1000 for name, took in newest["latencies_us"].items() if took}
    return {}
