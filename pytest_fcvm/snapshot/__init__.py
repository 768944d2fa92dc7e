"""Build once, clone many."""

from pytest_fcvm.snapshot.build import build_snapshot
from pytest_fcvm.snapshot.ingredients import Ingredients, choose_ready, snapshot_key
from pytest_fcvm.snapshot.snapshot import Snapshot, Workshop

__all__ = ["Ingredients", "Snapshot", "Workshop", "build_snapshot", "choose_ready", "snapshot_key"]
