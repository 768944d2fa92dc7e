"""Remove the files that killed processes left. Only a free lock shows a death: the kernel reuses process ids."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_fcvm.host.own import os, shutil
from pytest_fcvm.host.paths import LOCK_NAME, is_run_id

__all__ = ["sweep", "sweep_temporary"]

_DEAD = ".dead-"
_TEMPORARY = ".tmp-"


def sweep(run_root: Path) -> list[str]:
    """Remove run directories whose lock is free and return their names. Any number of processes may sweep at once."""
    swept = []
    for entry in _list(run_root):
        if entry.name.startswith(_DEAD):  # a janitor was killed while it removed this
            shutil.rmtree(entry, ignore_errors=True)
        elif is_run_id(entry.name) and _remove_if_free(entry, entry / LOCK_NAME):
            swept.append(entry.name)
    return swept


def sweep_temporary(store_dir: Path) -> list[str]:
    """Remove unfinished entries `<key>.tmp-*` whose lock, `<key>.lock` beside them, is free; return their names."""
    swept = []
    for entry in _list(store_dir):
        key, temporary, _ = entry.name.partition(_TEMPORARY)
        if temporary and not entry.name.startswith(_DEAD) and _remove_if_free(entry, store_dir / f"{key}.lock"):
            swept.append(entry.name)
        elif entry.name.startswith(_DEAD):
            shutil.rmtree(entry, ignore_errors=True)
    return swept


def _list(directory: Path) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink())
    except FileNotFoundError:
        return []


def _remove_if_free(entry: Path, lock: Path) -> bool:
    """Rename the directory while its lock is ours, so that one janitor removes it and no process starts to use it."""
    renamed = entry.with_name(f"{_DEAD}{os.urandom(4).hex()}")
    with _try_lock(lock) as locked:
        if not locked:
            return False
        try:
            entry.rename(renamed)
        except OSError:
            return False
    shutil.rmtree(renamed, ignore_errors=True)
    return True


@contextmanager
def _try_lock(lock: Path) -> Iterator[bool]:
    try:
        # Create a missing lock: a process may be between making its directory and the lock, or was killed there.
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        free = False
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        yield free
    finally:
        os.close(descriptor)
