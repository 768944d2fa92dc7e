"""`fcvm snapshot`: list, inspect, verify, remove and prune the entries of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pytest_fcvm import pruning
from pytest_fcvm.cli.table import render_age, render_json, render_size, render_table
from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.host.paths import cache_root
from pytest_fcvm.pruning import Bounds, Outcome
from pytest_fcvm.store import Collection, Entry, Store

__all__ = [
    "Listing",
    "Outcome",
    "find_all",
    "inspect",
    "prune",
    "remove",
    "render_facts",
    "render_listings",
    "render_outcomes",
    "verify",
]

_KINDS = ("snapshots", "images", "kernels")
_HIDDEN = ("secret",)  # the word by which clones are woken
_KEY = 12  # characters of a key that are shown
_WHO = "fcvm snapshot"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """An entry of the cache. Sizes are what is allocated on disk; times are seconds since 1970."""

    kind: str
    key: str
    image: str
    engine: str
    kernel: str
    size_bytes: int
    created_s: int
    used_s: int
    in_use: bool
    test: str = ""  # of a kept clone
    rootfs: str = field(default="", repr=False)


def find_all(cache_dir: str | None, *, everything: bool = False) -> list[Listing]:
    """Return the snapshots of a cache, with `everything` the root file systems and kernels too; used last first."""
    store = _store(cache_dir)
    return [
        _list(kind, entry, store.collection(kind))
        for kind, entry in _entries(store, _KINDS if everything else _KINDS[:1])
    ]


def render_listings(listings: Sequence[Listing], *, as_json: bool) -> str:
    """Return listings as a table or as JSON."""
    if as_json:
        return render_json([asdict(listing) for listing in listings])
    if not listings:
        return "the cache is empty\n"
    now = _now()
    rows = [
        (
            *(listing.key[:_KEY], listing.image or listing.kind, listing.engine, listing.kernel),
            *(render_size(listing.size_bytes), render_age(now - listing.used_s)),
            _remark(listing),
        )
        for listing in listings
    ]
    total = render_size(sum(listing.size_bytes for listing in listings))
    return (
        render_table(("KEY", "IMAGE", "ENGINE", "KERNEL", "SIZE", "USED", ""), rows) + f"{len(rows)} entries, {total}\n"
    )


def inspect(cache_dir: str | None, prefix: str) -> dict[str, Any]:
    """Return the facts of one entry without its secret. Raise UsageProblem for no such key or several."""
    store = _store(cache_dir)
    kind, entry = _resolve(store, prefix)
    facts = {name: value for name, value in entry.facts.items() if name not in _HIDDEN}
    return {**asdict(_list(kind, entry, store.collection(kind))), "path": str(entry.path), **facts}


def render_facts(facts: dict[str, Any], *, as_json: bool) -> str:
    """Return facts as lines of `name: value`, nested ones indented, or as JSON."""
    return render_json(facts) if as_json else "".join(_lines(facts, ""))


def verify(cache_dir: str | None, prefixes: Sequence[str]) -> list[Outcome]:
    """Hash entries again, all of them without prefixes. Quarantine what has changed, so that it is rebuilt."""
    store = _store(cache_dir)
    chosen = [_resolve(store, prefix) for prefix in prefixes] or _entries(store, _KINDS)
    return [_verify(store, kind, entry) for kind, entry in chosen]


def remove(cache_dir: str | None, prefixes: Sequence[str]) -> list[Outcome]:
    """Remove entries that no run uses."""
    store = _store(cache_dir)
    chosen = [_resolve(store, prefix) for prefix in prefixes]
    return [pruning.remove(kind, entry, store.collection(kind)) for kind, entry in chosen]


def prune(cache_dir: str | None, bounds: Bounds, *, dry_run: bool = False) -> list[Outcome]:
    """Remove the snapshots that were unused for longest until the bounds hold, then what only they needed.

    Raise UsageProblem without a bound. An entry in use stays, and counts.
    """
    if bounds == Bounds():
        raise UsageProblem("prune needs a bound", hint="--older-than 7d, --max-size 5G or --keep 10")
    return pruning.prune(_store(cache_dir), bounds, dry_run=dry_run)


def render_outcomes(outcomes: Sequence[Outcome], *, as_json: bool) -> str:
    """Return outcomes as a line each, or as JSON."""
    if as_json:
        return render_json([asdict(outcome) for outcome in outcomes])
    if not outcomes:
        return "nothing to do\n"
    room = render_size(sum(outcome.size_bytes for outcome in outcomes))
    rows = [(outcome.key[:_KEY], outcome.kind, outcome.what) for outcome in outcomes]
    return render_table(("KEY", "KIND", "OUTCOME"), rows) + (f"{room} in all\n" if room != "0 MiB" else "")


def _store(cache_dir: str | None) -> Store:
    return Store(cache_root(Path(cache_dir).resolve() if cache_dir else None))


def _entries(store: Store, kinds: Sequence[str]) -> list[tuple[str, Entry]]:
    return [(kind, entry) for kind in kinds for entry in store.collection(kind).entries()]


def _list(kind: str, entry: Entry, collection: Collection) -> Listing:
    about = entry.facts.get("about", {})
    return Listing(
        kind=kind,
        key=entry.key,
        image=about.get("image") or entry.facts.get("image", ""),
        engine=about.get("engine", ""),
        kernel=about.get("kernel") or entry.facts.get("kernel") or entry.facts.get("release", ""),
        size_bytes=entry.size_bytes,
        created_s=about.get("created_s", 0),
        used_s=int(entry.used_s),
        in_use=collection.is_in_use(entry.key),
        test=about.get("test", ""),
        rootfs=about.get("rootfs", ""),
    )


def _remark(listing: Listing) -> str:
    remarks = [f"kept of {listing.test}" if listing.test else "", "in use" if listing.in_use else ""]
    return ", ".join(filter(None, remarks))


def _resolve(store: Store, prefix: str) -> tuple[str, Entry]:
    found = [(kind, entry) for kind, entry in _entries(store, _KINDS) if entry.key.startswith(prefix)]
    if not found:
        raise UsageProblem(f"no entry of the cache begins with {prefix!r}", hint="fcvm snapshot ls --all shows them")
    if len(found) > 1:
        keys = ", ".join(entry.key[: len(prefix) + 8] for _, entry in found)
        raise UsageProblem(f"{prefix!r} is the beginning of several keys: {keys}", hint="write more of the key")
    return found[0]


def _verify(store: Store, kind: str, entry: Entry) -> Outcome:
    collection = store.collection(kind)
    with collection.locked(entry.key, _WHO, lambda _text: None):
        fault = collection.verify(entry.key)
    what = f"quarantined, will be rebuilt: {fault}" if fault else "valid"
    return Outcome(kind=kind, key=entry.key, what=what, bad=bool(fault))


def _now() -> float:
    return real_time_ns() / 1e9


def _lines(facts: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:\n", *_lines(value, f"{indent}  ")]
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{name}: {shown}\n")
    return lines
