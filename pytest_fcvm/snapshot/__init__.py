"""Build once, clone many."""

from pytest_fcvm.snapshot.builder import build_snapshot
from pytest_fcvm.snapshot.inputs import Ingredients, choose_ready, snapshot_key
from pytest_fcvm.snapshot.snapshot import Snapshot, Workshop

__all__ = ["Ingredients", "Snapshot", "Workshop", "build_snapshot", "choose_ready", "snapshot_key"]
