"""Build once, clone many."""

from pytest_fcvm.snapshot.builder import build_snapshot
from pytest_fcvm.snapshot.inputs import SnapshotInputs, choose_ready, snapshot_key
from pytest_fcvm.snapshot.opened import OpenSnapshots
from pytest_fcvm.snapshot.snapshot import OpenSnapshot, SnapshotRuntime

__all__ = [
    "OpenSnapshot",
    "OpenSnapshots",
    "SnapshotInputs",
    "SnapshotRuntime",
    "build_snapshot",
    "choose_ready",
    "snapshot_key",
]
