"""`fcvm replay`: run clones again that `--fcvm-keep` has saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pytest_fcvm.cli.shell import read_settings, run_in, say, shell_harness
from pytest_fcvm.cli.table import render_age, render_json, render_size, render_table
from pytest_fcvm.clone import Clone
from pytest_fcvm.errors import UsageProblem
from pytest_fcvm.host.libc import real_time_ns
from pytest_fcvm.host.paths import cache_root
from pytest_fcvm.store import Entry, Store

__all__ = ["Kept", "find_kept", "open_kept", "render_kept"]

_KEY = 12  # characters of a key that are shown


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A clone that was kept. `size_bytes` is what is allocated on disk; `created_s` is in seconds since 1970."""

    test: str
    clone: str
    key: str
    created_s: int
    size_bytes: int
    engine: str
    accelerator: str
    entry: Entry = field(repr=False)


def find_kept(cache_dir: str | None) -> list[Kept]:
    """Return the kept clones of a cache, the latest first."""
    store = Store(cache_root(Path(cache_dir).resolve() if cache_dir else None))
    kept = [
        _kept(entry)
        for entry in store.collection("snapshots").entries()
        if {"test", "accelerator"} <= entry.facts.get("about", {}).keys()
    ]
    return sorted(kept, key=lambda one: one.created_s, reverse=True)


def render_kept(kept: Sequence[Kept], *, as_json: bool) -> str:
    """Return kept clones as a table or as JSON."""
    if as_json:
        return render_json([{name: value for name, value in asdict(one).items() if name != "entry"} for one in kept])
    if not kept:
        return "nothing is kept; pytest --fcvm-keep failed saves the clones of tests that fail\n"
    now = real_time_ns() / 1e9
    rows = [
        (one.test, one.clone, one.key[:_KEY], render_age(now - one.created_s), render_size(one.size_bytes))
        for one in kept
    ]
    return render_table(("TEST", "CLONE", "KEY", "KEPT", "SIZE"), rows)


def open_kept(settings: Mapping[str, Any], test: str, clone: str | None, command: Sequence[str]) -> int:
    """Replay a kept clone and run a command in it, or its shell; return the exit code.

    `test` is a test's id, part of it, or the beginning of a key. The kept clone stays as it is: each replay is a new
    clone of it. Raise UsageProblem for none or several, HostError when this host cannot run it any more.
    """
    kept = _choose(find_kept(settings.get("cache_dir")), test, clone)
    options = read_settings({**settings, "engine": kept.engine, "accel": kept.accelerator})
    with shell_harness(options) as harness, harness.replay(kept.entry).clone(name=kept.clone) as live:
        age = render_age(real_time_ns() / 1e9 - kept.created_s)
        say(f"{kept.clone} of {kept.test}, kept {age}{_ports(live, kept.entry.facts['client_port'])}")
        return run_in(live, command)


def _kept(entry: Entry) -> Kept:
    about = entry.facts["about"]
    return Kept(
        test=about["test"],
        clone=about["clone"],
        key=entry.key,
        created_s=about["created_s"],
        size_bytes=entry.size_bytes,
        engine=about["engine_name"],
        accelerator=about["accelerator"],
        entry=entry,
    )


def _choose(kept: Sequence[Kept], test: str, clone: str | None) -> Kept:
    if not kept:
        raise UsageProblem("nothing is kept", hint="pytest --fcvm-keep failed saves the clones of tests that fail")
    exact = [one for one in kept if one.test == test]
    found = exact or [one for one in kept if test in one.test or one.key.startswith(test)]
    found = [one for one in found if clone in (None, one.clone)]
    if not found:
        raise UsageProblem(f"nothing is kept of {test!r}", hint="fcvm replay lists what is")
    if len(found) > 1:
        tests = {one.test for one in found}
        names = ", ".join(sorted(tests if len(tests) > 1 else {one.clone for one in found}))
        hint = "write more of it" if len(tests) > 1 else "name one with --clone"
        raise UsageProblem(f"{test!r} fits several: {names}", hint=hint)
    return found[0]


def _ports(clone: Clone, service: int | None) -> str:
    """Return where its service and its published ports are on the host."""
    wanted = dict.fromkeys((port.guest_port, str(port.proto)) for port in clone.spec.publish)
    if service is not None:
        wanted = {(service, "tcp"): None, **wanted}
    endpoints = ((port, proto, *clone.endpoint(port, proto)) for port, proto in wanted)
    return "".join(f"; {port}/{proto} is {host}:{mapped}" for port, proto, host, mapped in endpoints)
