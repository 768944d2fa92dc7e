"""The cache: one build for all processes, no use of an invalid entry, no files of a failed build."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.supervisor.janitor import sweep_temporary
from pytest_fcvm.store import Collection, Entry, Store, canonical_digest

_KEY = canonical_digest({"what": "a test's entry"})
_SIZE = 300_000

# Lock, look and build if needed, as the harness does. Print a line per event. "stops": wait for a line on stdin.
_BUILDER = """
import sys
from pathlib import Path
from pytest_fcvm.store import Store
root, key, stops = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "stops"
collection = Store(root).collection("snapshots")
def make(directory):
    (directory / "memory").write_bytes(b"m" * 300000)
    print("building", flush=True)
    if stops:
        sys.stdin.readline()
    return {"answer": 42}
def report(text):
    print(text, flush=True)
with collection.locked(key, "test_x.py::test_y", report) as phase:
    phase("booting")
    entry = collection.find(key) or collection.build(key, make)
print("facts", entry.facts, flush=True)
"""


def _make(directory: Path) -> Mapping[str, Any]:
    (directory / "memory").write_bytes(b"m" * _SIZE)
    (directory / "state").write_bytes(b"state")
    return {"answer": 42}


def _build(collection: Collection) -> Entry:
    with collection.locked(_KEY, "test", pytest.fail):
        return collection.build(_KEY, _make)


def _find_locked(collection: Collection) -> Entry | None:
    with collection.locked(_KEY, "test", pytest.fail):
        return collection.find(_KEY)


@contextmanager
def _process(root: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _BUILDER, str(root), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def notes() -> list[str]:
    """The notes of the store."""
    return []


@pytest.fixture
def store(tmp_path: Path, notes: list[str]) -> Store:
    """A store in a directory of its own."""
    return Store(tmp_path / "store", note=notes.append)


@pytest.fixture
def collection(store: Store) -> Collection:
    """An empty collection."""
    return store.collection("snapshots")


def test_a_built_entry_is_found_with_its_facts_and_files(collection: Collection, notes: list[str]) -> None:
    assert collection.find(_KEY) is None
    built = _build(collection)
    found = collection.find(_KEY)
    assert found == built
    assert found is not None
    assert found.facts == {"answer": 42}
    assert found.file("memory").read_bytes() == b"m" * _SIZE
    assert (found.path.stat().st_mode & 0o777, found.file("manifest.json").stat().st_mode & 0o777) == (0o700, 0o600)
    assert notes == []


def test_one_of_many_processes_builds_and_the_others_say_what_they_wait_for(tmp_path: Path) -> None:
    with _process(tmp_path, _KEY, "stops") as first:
        assert _next_line(first) == "building"
        with _process(tmp_path, _KEY, "-") as second, _process(tmp_path, _KEY, "-") as third:
            for waiting in (second, third):
                assert _next_line(waiting) == f"waiting for pid {first.pid} (test_x.py::test_y): booting"
            first.communicate("go on\n", timeout=30)
            for waiting in (second, third):
                assert _next_line(waiting) == "facts {'answer': 42}"
                assert waiting.wait(30) == 0


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    script = [sys.executable, "-c", _BUILDER, str(tmp_path), _KEY, "-"]
    racing = [subprocess.Popen(script, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = "".join(process.communicate(timeout=60)[0] for process in racing)
    assert said.count("building") == 1
    assert said.count("facts {'answer': 42}") == 6


def test_a_killed_builder_frees_the_lock_and_the_next_build_removes_its_files(
    tmp_path: Path, store: Store, collection: Collection
) -> None:
    with _process(store.root, _KEY, "stops") as builder:
        assert _next_line(builder) == "building"
        builder.kill()
        builder.wait(30)
    assert [path.name for path in collection.path.glob("*.tmp-*")] == [f"{_KEY}.tmp-{builder.pid}"]
    _build(collection)
    assert sorted(path.name for path in collection.path.iterdir()) == [_KEY, f"{_KEY}.lock"]


def test_a_half_built_entry_is_swept_only_when_its_builder_is_dead(store: Store, collection: Collection) -> None:
    with _process(store.root, _KEY, "stops") as builder:
        assert _next_line(builder) == "building"
        assert sweep_temporary(collection.path) == []
        builder.kill()
        builder.wait(30)
        assert sweep_temporary(collection.path) == [f"{_KEY}.tmp-{builder.pid}"]
    assert list(collection.path.glob("*.tmp-*")) == []


def test_a_failed_build_leaves_no_files(collection: Collection) -> None:
    def fail(directory: Path) -> Mapping[str, Any]:
        _make(directory)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), collection.locked(_KEY, "test", pytest.fail):
        collection.build(_KEY, fail)
    assert [path.name for path in collection.path.iterdir()] == [f"{_KEY}.lock"]


def _truncate(entry: Path) -> None:
    os.truncate(entry / "memory", 1000)


def _flip(entry: Path) -> None:
    before = (entry / "memory").stat()
    with (entry / "memory").open("r+b") as file:
        file.seek(_SIZE // 2)
        file.write(b"x")
    os.utime(entry / "memory", ns=(before.st_atime_ns, before.st_mtime_ns))  # ctime cannot be forged


def _remove(entry: Path) -> None:
    (entry / "state").unlink()


def _edit(entry: Path, **changes: object) -> None:
    manifest = json.loads((entry / "manifest.json").read_text())
    (entry / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def _cut_manifest(entry: Path) -> None:
    text = (entry / "manifest.json").read_text()
    (entry / "manifest.json").write_text(text[: len(text) // 2])


_FAULTS = {
    "memory has changed": [_truncate, _flip],
    "state is missing": [_remove],
    "it is from another version": [lambda entry: _edit(entry, schema=0), lambda entry: _edit(entry, key="other")],
    "manifest.json has changed": [lambda entry: _edit(entry, facts={"answer": 43})],
    "its manifest is not readable": [
        _cut_manifest,
        lambda entry: (entry / "manifest.json").write_text("[]"),
        lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe"),
    ],
}


@pytest.mark.parametrize(("fault", "damage"), [(fault, damage) for fault, ways in _FAULTS.items() for damage in ways])
def test_a_damaged_entry_is_quarantined_with_one_note_and_rebuilt(
    fault: str, damage: Any, collection: Collection, notes: list[str]
) -> None:
    damage(_build(collection).path)
    assert collection.find(_KEY) is None
    assert notes == []  # without the lock, the entry is only not used
    assert _find_locked(collection) is None
    assert len(notes) == 1
    assert notes[0].startswith(f"cache entry {_KEY[:12]} is quarantined and rebuilt: {fault}")
    (quarantined,) = collection.path.glob("*.bad-*")
    assert notes[0].endswith(f"({quarantined})")
    _build(collection)
    assert collection.find(_KEY) is not None
    assert len(notes) == 1


def test_only_the_last_damaged_entry_is_kept(collection: Collection, notes: list[str]) -> None:
    for _ in range(2):
        _truncate(_build(collection).path)
        assert _find_locked(collection) is None
    assert len(list(collection.path.glob("*.bad-*"))) == 1
    assert len(notes) == 2


def test_without_the_lock_an_invalid_entry_stays_where_it_is(collection: Collection) -> None:
    _truncate(_build(collection).path)
    assert Collection(path=collection.path).find(_KEY) is None
    assert (collection.path / _KEY).is_dir()


def test_a_rebuilt_entry_replaces_the_old_one(collection: Collection, notes: list[str]) -> None:
    _build(collection)
    _build(collection)
    assert sorted(path.name for path in collection.path.iterdir()) == [_KEY, f"{_KEY}.lock"]
    assert notes == []


def test_a_copied_store_is_hashed_once_and_then_trusted(tmp_path: Path, store: Store, collection: Collection) -> None:
    _build(collection)
    copy = Store(Path(shutil.copytree(store.root, tmp_path / "copy"))).collection("snapshots")
    before = json.loads((copy.path / _KEY / "manifest.json").read_text())
    entry = copy.find(_KEY)
    assert entry is not None
    after = json.loads(entry.file("manifest.json").read_text())
    assert after["files"]["memory"]["stamp"] != before["files"]["memory"]["stamp"]
    restamped = entry.file("manifest.json").stat().st_mtime_ns
    assert copy.find(_KEY) == entry
    assert entry.file("manifest.json").stat().st_mtime_ns == restamped


def test_an_entry_is_hashed_again_only_when_a_stamp_differs(collection: Collection) -> None:
    entry = _build(collection)
    assert _bytes_read_by_finding(collection) < _SIZE
    os.utime(entry.file("memory"))
    assert _bytes_read_by_finding(collection) >= _SIZE
    assert _bytes_read_by_finding(collection) < _SIZE


def _bytes_read_by_finding(collection: Collection) -> int:
    before = _bytes_read()
    assert collection.find(_KEY) is not None
    return _bytes_read() - before


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])  # rchar: what read() returned, cached or not


def test_an_entry_in_use_stays_locked_when_its_manifest_is_rewritten(collection: Collection) -> None:
    entry = _build(collection)
    with entry.in_use():
        os.utime(entry.file("state"))  # the next find rewrites the manifest
        assert collection.find(_KEY) is not None
        assert not _can_lock(entry.path)
    assert _can_lock(entry.path)


def _can_lock(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


_FULL_DISK = """
import sys
from pathlib import Path
from pytest_fcvm.errors import HostError
from pytest_fcvm.store import Store
store = Store(Path(sys.argv[1]))
collection = store.collection("snapshots")
def small(directory):
    (directory / "state").write_bytes(b"state")
    return {}
def large(directory):
    (directory / "state").write_bytes(b"state")
    (directory / "memory").write_bytes(b"m" * (4 << 20))
    return {}
with collection.locked("other", "test", print):
    collection.build("other", small)
store.hidden_digest({})
with collection.locked("large", "test", print):
    try:
        collection.build("large", large)
    except HostError as error:
        print(error.message, "|", error.hint)
(store.root / "filler").open("wb", buffering=0).write(b"x" * (4 << 20))
print(sorted(path.name for path in collection.path.iterdir()), collection.find("other") is not None)
print(store.hidden_digest({"A": "1"}) == store.hidden_digest({"A": "1"}))
"""


def test_a_full_disk_is_a_host_error_that_names_the_directory_and_leaves_other_entries_alone(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    at, python = shlex.quote(str(place)), shlex.quote(sys.executable)
    mount = f'mount -t tmpfs -o size=1m none {at} && exec {python} -c "$0" {at}'
    if subprocess.run([*unshare, "sh", "-c", f"mount -t tmpfs none {at}"], capture_output=True).returncode:
        pytest.skip("this host does not let users mount a tmpfs in their own namespace")
    done = subprocess.run([*unshare, "sh", "-c", mount, _FULL_DISK], capture_output=True, text=True, timeout=60)
    full, left, digest = done.stdout.splitlines() or [done.stderr, "", ""]
    hint = "free disk space or name another --fcvm-cache-dir"
    assert full == f"no room left in {place}/snapshots: No space left on device | {hint}"
    assert left == "['large.lock', 'other', 'other.lock'] True"
    assert digest == "True"


def test_a_limit_on_the_size_of_files_is_a_host_error_too(tmp_path: Path) -> None:
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n{_FULL_DISK}"
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"no room left in {tmp_path}/snapshots: File too large | free disk space")


def test_values_of_environment_variables_change_the_digest_and_are_in_no_file(store: Store) -> None:
    collection = store.collection("snapshots")
    digest = store.hidden_digest({"PASSWORD": "tiger-lily"})
    assert digest == Store(store.root).hidden_digest({"PASSWORD": "tiger-lily"})
    assert digest != store.hidden_digest({"PASSWORD": "other"})
    with collection.locked(digest, "test", pytest.fail):
        collection.build(digest, lambda _directory: {"env": digest})
    for path in store.root.rglob("*"):
        assert not path.is_file() or b"tiger" not in path.read_bytes()
    assert (store.root / "secret").stat().st_mode & 0o777 == 0o600


def test_two_stores_give_two_digests_of_one_value(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        digests.add(Store(tmp_path / name).hidden_digest({"PASSWORD": "tiger-lily"}))
    assert len(digests) == 2


def test_processes_that_start_together_agree_on_the_secret(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pytest_fcvm.store import Store\n"
        "sys.stdin.readline(); print(Store(Path(sys.argv[1])).hidden_digest({'A': '1'}))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    racing = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in racing:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert len({process.communicate(timeout=60)[0] for process in racing}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_lock_under_a_replaced_os_open_is_a_host_error(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", lambda *_arguments: "no descriptor")
    with pytest.raises(HostError, match="TypeError") as caught, collection.locked(_KEY, "test", pytest.fail):
        pytest.fail("the block must not run")
    assert caught.value.hint == "start a clone before a test replaces os.open"


def test_a_waiter_gets_the_lock_as_soon_as_it_is_free(collection: Collection) -> None:
    said: list[str] = []
    with _process(collection.path.parent, _KEY, "stops") as builder:
        assert _next_line(builder) == "building"

        def free_the_lock(text: str) -> None:
            said.append(text)
            builder.kill()

        with collection.locked(_KEY, "test", free_the_lock):
            assert wait_until(lambda: builder.poll() is not None, Deadline(5))
    assert said == [f"waiting for pid {builder.pid} (test_x.py::test_y): booting"]
