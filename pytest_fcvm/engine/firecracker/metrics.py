"""What Firecracker measures of its own work (its docs/metrics.md): a JSON object per line of a file."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from pytest_fcvm.host.files import read_regular

__all__ = ["METRICS_FILE", "read_latencies"]

METRICS_FILE = "metrics.json"


def read_latencies(path: Path) -> dict[str, float]:
    """Return how long what was done took, in ms by Firecracker's names (`load_snapshot`); of the newest line.

    Nothing for a file that is not there, or not whole.
    """
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        newest = json.loads(read_regular(path).splitlines()[-1])
        return {name: took / 1000 for name, took in newest["latencies_us"].items() if took}
    return {}
