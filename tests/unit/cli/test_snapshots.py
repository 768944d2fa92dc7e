"""`fcvm snapshot` on a real store: what is listed, verified, removed, and what stays."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.cli import main
from pytest_fcvm.pruning import free_space
from pytest_fcvm.store import Entry, Store, canonical_digest

Make = Callable[..., Entry]
_NOW = 1_800_000_000


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache."""
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def make(cache: Path) -> Make:
    """Return a function that builds an entry of a kind, last used so many days ago."""

    def build(name: str, days: float = 0, kind: str = "snapshots", mib: int = 1, **facts: Any) -> Entry:
        collection, key = Store(cache).collection(kind), canonical_digest({"name": name})

        def fill(directory: Path) -> dict[str, Any]:
            (directory / "memory").write_bytes(os.urandom(mib << 20))
            return facts

        with collection.locked(key, "a test", lambda _text: None):
            entry = collection.build(key, fill)
        used = (entry.used_s - days * 86400,) * 2
        os.utime(entry.path, used)
        return entry

    return build


@pytest.fixture
def fcvm(cache: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs `fcvm snapshot …` and returns exit code and output, JSON as data."""

    def run(verb: str, *words: str) -> Any:
        code = main(["snapshot", verb, "--cache-dir", str(cache), *words])
        out, err = capsys.readouterr()
        return code, (json.loads(out) if "--json" in words and out else out), err

    return run


def _about(image: str, rootfs: str = "") -> dict[str, Any]:
    return {"image": image, "engine": "qemu 7.2, tcg", "kernel": "6.12", "rootfs": rootfs, "created_s": _NOW}


def test_snapshots_are_listed_those_used_last_first(make: Make, fcvm: Callable[..., Any]) -> None:
    make("old", days=3, about=_about("postgres:15"))
    new = make("new", about=_about("nginx:1"))
    make("rootfs", kind="images", image="nginx:1", digest="sha256:1")
    code, text, _ = fcvm("ls")
    lines = text.splitlines()
    assert code == 0
    assert [line.split()[1] for line in lines[1:3]] == ["nginx:1", "postgres:15"]
    assert lines[1].split()[:8] == [new.key[:12], "nginx:1", "qemu", "7.2,", "tcg", "6.12", "1", "MiB"]
    assert re.search("(now|s ago)$", lines[1])
    assert "3 d ago" in lines[2]
    assert lines[3] == "2 entries, 2 MiB"
    _, rows, _ = fcvm("ls", "--all", "--json")
    assert [row["kind"] for row in rows] == ["snapshots", "snapshots", "images"]


def test_an_empty_cache_is_said_to_be_empty(fcvm: Callable[..., Any]) -> None:
    assert fcvm("ls") == (0, "the cache is empty\n", "")
    assert fcvm("ls", "--json") == (0, [], "")
    assert fcvm("verify") == (0, "nothing to do\n", "")


def test_inspect_shows_everything_but_the_secret(make: Make, fcvm: Callable[..., Any]) -> None:
    entry = make("one", secret="c0ffee", timings={"boot_ms": 1.5}, about=_about("nginx:1"))
    _, text, _ = fcvm("inspect", entry.key[:6])
    assert f"key: {entry.key}\n" in text
    assert "timings:\n  boot_ms: 1.5\n" in text
    assert "c0ffee" not in text
    assert "c0ffee" not in json.dumps(fcvm("inspect", entry.key, "--json")[1])


def test_the_beginning_of_a_key_must_be_that_of_one(make: Make, fcvm: Callable[..., Any]) -> None:
    keys = [make(str(number)).key for number in range(17)]
    first = next(key[0] for key in keys if sum(other[0] == key[0] for other in keys) > 1)
    code, _, err = fcvm("inspect", first)
    assert code == 2
    assert "is the beginning of several keys" in err
    assert fcvm("rm", "xyz")[2].startswith("fcvm: no entry of the cache begins with 'xyz'\nhint: fcvm snapshot ls")


def test_verify_hashes_again_and_quarantines_what_has_changed(make: Make, fcvm: Callable[..., Any]) -> None:
    valid, broken = make("valid"), make("broken")
    memory = broken.file("memory")
    status = memory.stat()
    with memory.open("r+b") as file:
        file.seek(5000)
        file.write(b"flipped")
    os.utime(memory, ns=(status.st_atime_ns, status.st_mtime_ns))
    code, outcomes, _ = fcvm("verify", "--json")
    assert code == 1
    said = {outcome["key"]: outcome["what"] for outcome in outcomes}
    assert said == {valid.key: "valid", broken.key: "quarantined, will be rebuilt: memory has changed"}
    assert fcvm("verify", valid.key[:8])[0] == 0
    assert not broken.path.exists()


def test_what_a_run_uses_is_neither_removed_nor_replaced(make: Make, fcvm: Callable[..., Any], cache: Path) -> None:
    entry = make("used", days=30)
    program = (
        "import sys; from pathlib import Path; from pytest_fcvm.store import Store\n"
        f"entry = Store(Path({str(cache)!r})).collection('snapshots').find({entry.key!r})\n"
        "with entry.in_use():\n    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdin is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        os.utime(entry.path, (0, 0))
        code, text, _ = fcvm("rm", entry.key)
        assert (code, "kept: a run uses it" in text) == (1, True)
        assert fcvm("prune", "--keep", "0") == (0, "nothing to do\n", "")
        assert fcvm("ls", "--json")[1][0]["in_use"] is True
        with pytest.raises(Exception, match=r"cannot replace cache entry .*: another run uses it"):
            make("used")
        assert entry.file("memory").exists()
        holder.stdin.close()
    assert fcvm("rm", entry.key)[0] == 0
    assert not entry.path.exists()


def test_prune_keeps_within_each_bound_and_lets_go_of_what_only_the_pruned_needed(
    make: Make, fcvm: Callable[..., Any], cache: Path
) -> None:
    shared, lonely = (make(name, days=40, kind="images", digest="x", image=name).key for name in ("shared", "lonely"))
    kept = [make(f"new{number}", days=number, about=_about("a", shared)).path for number in range(2)]
    gone = make("old", days=30, about=_about("b", lonely)).path
    code, text, _ = fcvm("prune", "--older-than", "7d", "--dry-run")
    assert (code, text.count("would be removed")) == (0, 2)
    assert gone.exists()
    assert fcvm("prune", "--older-than", "7d")[0] == 0
    assert ([path.exists() for path in kept], gone.exists()) == ([True, True], False)
    assert [path.name for path in (cache / "images").iterdir() if path.is_dir()] == [shared]
    fcvm("prune", "--max-size", "2M")  # two of 1 MiB and their manifests are more
    assert [path.exists() for path in kept] == [True, False]
    fcvm("prune", "--keep", "0")
    assert [path.exists() for path in kept] == [False, False]
    assert not (cache / "images" / shared).exists()


def test_room_is_made_only_where_there_is_too_little(make: Make, cache: Path) -> None:
    rootfs = make("rootfs", kind="images", digest="x", image="b").key
    unneeded = make("pulled just now", kind="images", digest="y", image="c").path
    new, old = make("new", about=_about("a")).path, make("old", days=3, about=_about("b", rootfs)).path
    store = Store(cache)
    assert free_space(store, 100) == 0
    assert unneeded.exists()  # somebody may be about to use it
    with Entry(path=old, key=old.name, facts={}).in_use():
        assert free_space(store, 1) >= 1 << 20  # the old one stays, and the newest makes room for it
    assert (new.exists(), old.exists()) == (False, True)
    assert free_space(store, 1) >= 2 << 20
    assert not old.exists()
    assert not (cache / "images" / rootfs).exists()


def test_prune_without_a_bound_is_wrong_usage(fcvm: Callable[..., Any]) -> None:
    code, _, err = fcvm("prune")
    assert (code, "--older-than 7d" in err) == (2, True)
