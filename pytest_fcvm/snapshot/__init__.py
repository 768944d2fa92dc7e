"""Build once, clone many."""

from pytest_fcvm.snapshot.builder import build_snapshot
from pytest_fcvm.snapshot.inputs import SnapshotInputs, choose_ready, snapshot_key
from pytest_fcvm.snapshot.snapshot import Snapshot, SnapshotRuntime

__all__ = ["Snapshot", "SnapshotInputs", "SnapshotRuntime", "build_snapshot", "choose_ready", "snapshot_key"]
