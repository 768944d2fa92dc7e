"""The snapshots that this process has open, and how many of them keep a pool."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.snapshot.snapshot import OpenSnapshot

__all__ = ["OpenSnapshots"]

_POOLS = 4  # snapshots whose pools are kept


class OpenSnapshots:
    """Snapshots by what their clones are to be like. Only those asked for last keep a pool."""

    def __init__(self) -> None:
        self._snapshots: dict[Hashable, OpenSnapshot] = {}  # in the order in which they were last asked for

    def get(self, wanted: Hashable, make: Callable[[], OpenSnapshot]) -> OpenSnapshot:
        """Return the snapshot for `wanted`, made by `make` the first time. Release the pools of others beyond four."""
        snapshot = self._snapshots.pop(wanted, None) or make()
        self._snapshots[wanted] = snapshot
        for older in list(self._snapshots.values())[:-_POOLS]:
            older.release()
        return snapshot

    def release(self) -> None:
        """Release all prewarmed clones: a test needs their room."""
        for snapshot in list(self._snapshots.values()):
            snapshot.release()

    @property
    def lost(self) -> int:
        """Return how many prewarmed clones died before a test took them."""
        return sum(snapshot.lost for snapshot in self._snapshots.values())

    @property
    def rewound(self) -> int:
        """Return how many clones took over the VM of an earlier one."""
        return sum(snapshot.rewound for snapshot in self._snapshots.values())

    @property
    def doubts(self) -> list[str]:
        """Return a line about VMs that could not be rewound, if there were any."""
        failed = sum(snapshot.rewinds_failed for snapshot in self._snapshots.values())
        return [f"VMs that could not be rewound: {failed}; new ones took their place"] if failed else []

    @property
    def faults(self) -> list[FcvmError]:
        """Return why clones could not be prewarmed, one error for each snapshot where that happened."""
        return [snapshot.fault for snapshot in self._snapshots.values() if snapshot.fault]

    def close(self) -> None:
        """Close all of them; all are tried, the first failure is raised at the end. Idempotent."""
        with ExitStack() as closers:
            for snapshot in self._snapshots.values():
                closers.callback(snapshot.close)
