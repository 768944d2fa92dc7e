"""What dead processes left is swept; what a live one holds is not touched."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from pytest_fcvm.host.paths import LOCK_NAME, RunDir
from pytest_fcvm.host.supervisor.janitor import sweep, sweep_temporary

HOLD = "import sys; from pathlib import Path; from pytest_fcvm.host.paths import RunDir\n"
HOLD += "run = RunDir(Path(sys.argv[1])).__enter__(); (run.path / 'file').touch(); print(run.path, flush=True); input()"


def hold(run_root: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_directory_is_removed_when_its_owner_was_killed_and_not_before(run_root: Path) -> None:
    process, path = hold(run_root)
    try:
        assert sweep(run_root) == []
        assert (path / "file").exists()
    finally:
        process.kill()
        process.communicate()
    assert sweep(run_root) == [path.name]
    assert list(run_root.iterdir()) == []


def test_process_ids_do_not_count(run_root: Path) -> None:
    dead = run_root / "0badcafe"
    dead.mkdir()
    (dead / LOCK_NAME).write_text(str(os.getpid()))
    assert sweep(run_root) == ["0badcafe"]


def test_a_directory_without_a_lock_is_removed(run_root: Path) -> None:
    (run_root / "0badcafe").mkdir()
    assert sweep(run_root) == ["0badcafe"]
    assert list(run_root.iterdir()) == []


def test_other_files_stay(run_root: Path, tmp_path: Path) -> None:
    (run_root / "admission").mkdir()
    (run_root / "0badcafe").symlink_to(tmp_path)
    (run_root / "deadbeef").touch()
    (tmp_path / "kept").touch()
    assert sweep(run_root) == []
    assert {entry.name for entry in run_root.iterdir()} == {"admission", "0badcafe", "deadbeef"}
    assert (tmp_path / "kept").exists()


def test_the_next_sweep_finishes_one_that_was_killed(run_root: Path) -> None:
    (run_root / ".dead-00000000" / "deep").mkdir(parents=True)
    assert sweep(run_root) == []
    assert list(run_root.iterdir()) == []


def test_a_missing_run_root_is_no_error(run_root: Path) -> None:
    assert sweep(run_root / "none") == []


def test_concurrent_sweeps_never_remove_a_directory_in_use(run_root: Path) -> None:
    over = threading.Event()

    def sweep_on() -> list[str]:
        names = []
        while not over.is_set():
            names += sweep(run_root)
        return names

    def live(_number: int) -> str:
        with RunDir(run_root) as run:
            (run.path / "file").touch()
            for _ in range(3):
                sweep(run_root)
            assert (run.path / "file").exists()
            assert (run.path / LOCK_NAME).exists()
            return run.path.name

    with ThreadPoolExecutor(8) as pool:
        sweepers = [pool.submit(sweep_on) for _ in range(3)]
        try:
            lived = set(pool.map(live, range(200)))
        finally:
            over.set()
        swept = [name for sweeper in sweepers for name in sweeper.result()]
    # A sweeper may get one that has just been left or has not been taken yet, never the same one twice.
    assert len(lived) == 200
    assert len(swept) == len(set(swept))
    assert list(run_root.iterdir()) == []


def test_unfinished_entries_are_removed_when_their_keys_lock_is_free(tmp_path: Path) -> None:
    for name in ("aaaa.tmp-1", "aaaa.tmp-2", "bbbb.tmp-1", "cccc"):
        (tmp_path / name / "deep").mkdir(parents=True)
    with FileLock(tmp_path / "bbbb.lock"):
        assert sweep_temporary(tmp_path) == ["aaaa.tmp-1", "aaaa.tmp-2"]
    assert {entry.name for entry in tmp_path.iterdir() if entry.is_dir()} == {"bbbb.tmp-1", "cccc"}
    assert sweep_temporary(tmp_path) == ["bbbb.tmp-1"]
    assert sweep_temporary(tmp_path / "none") == []
