"""Free space in the cache: remove the snapshots that were last used longest ago, then the images that only they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.store import Collection, Entry, Store

__all__ = ["Bounds", "Outcome", "free_space", "free_space_beside", "prune", "remove"]

_SNAPSHOTS, _IMAGES = "snapshots", "images"
_WHO = "freeing space"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Which snapshots to keep: those used in the last `older_than_s` seconds, at most `max_mib` in all, at most `keep`.

    None sets no bound.
    """

    older_than_s: float | None = None
    max_mib: int | None = None
    keep: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened to an entry, and why. With a `bad` outcome the command exits with 1."""

    kind: str
    key: str
    what: str
    bad: bool = False
    size_bytes: int = 0


def remove(kind: str, entry: Entry, collection: Collection) -> Outcome:
    """Remove an entry unless a process uses it."""
    size = entry.size_bytes
    with collection.locked(entry.key, _WHO, lambda _text: None):
        gone = collection.remove(entry.key)
    what = "removed" if gone else "kept: a run uses it"
    return Outcome(kind=kind, key=entry.key, what=what, bad=not gone, size_bytes=size if gone else 0)


def prune(store: Store, bounds: Bounds, *, dry_run: bool = False) -> list[Outcome]:
    """Remove snapshots until the bounds hold, then the root file systems that only they use. Return the outcomes.

    Entries in use stay, and count. With `dry_run`, remove nothing and return what would be removed.
    """
    snapshots, images = store.collection(_SNAPSHOTS), store.collection(_IMAGES)
    before_s = real_time_ns() / 1e9 - bounds.older_than_s if bounds.older_than_s else None
    doomed = _choose(snapshots, bounds, before_s)
    used = {_rootfs_of(entry) for entry in snapshots.entries() if entry.key not in {one.key for one in doomed}}
    orphans = [
        entry
        for entry in images.entries()
        if "digest" in entry.facts
        and entry.key not in used
        and (before_s is None or entry.used_s < before_s)
        and not images.is_in_use(entry.key)
    ]
    chosen = [
        *((_SNAPSHOTS, entry, snapshots) for entry in doomed),
        *((_IMAGES, entry, images) for entry in orphans),
    ]
    if dry_run:
        what = "would be removed"
        return [Outcome(kind=kind, key=entry.key, what=what, size_bytes=entry.size_bytes) for kind, entry, _ in chosen]
    return [remove(kind, entry, collection) for kind, entry, collection in chosen]


def free_space(store: Store, max_mib: int) -> int:
    """Prune if all snapshots together take more than `max_mib`. Return how many bytes this freed."""
    bounds = Bounds(max_mib=max_mib)
    if not _choose(store.collection(_SNAPSHOTS), bounds, None):
        return 0
    return sum(outcome.size_bytes for outcome in prune(store, bounds))


def free_space_beside(newest: Entry, store: Store, max_mib: int | None) -> Sequence[str]:
    """Remove the snapshots last used longest ago, but never `newest`. Return notes for the user."""
    if max_mib is None:
        return ()
    with newest.in_use():
        freed = free_space(store, max_mib)
    return [f"the cache was larger than --fcvm-cache-limit: freed {freed >> 20} MiB"] if freed else ()


def _choose(collection: Collection, bounds: Bounds, before_s: float | None) -> Sequence[Entry]:
    doomed, kept, room = [], 0, (bounds.max_mib or 0) << 20
    for entry in collection.entries():  # the last used first
        size = entry.size_bytes
        room -= size
        kept += 1
        too_old = before_s is not None and entry.used_s < before_s
        too_many = bounds.keep is not None and kept > bounds.keep
        too_large = bounds.max_mib is not None and room < 0
        if (too_old or too_many or too_large) and not collection.is_in_use(entry.key):
            doomed.append(entry)
            room, kept = room + size, kept - 1
    return doomed


def _rootfs_of(entry: Entry) -> str:
    return str(entry.facts.get("about", {}).get("rootfs", ""))
