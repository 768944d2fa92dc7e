"""Remove what killed processes left behind. A free lock is the only proof of death: process ids come back."""

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
        if entry.name.startswith(_DEAD):  # a sweeper was killed after it had proven the death
            shutil.rmtree(entry, ignore_errors=True)
        elif is_run_id(entry.name) and _bury(entry, entry / LOCK_NAME):
            swept.append(entry.name)
    return swept


def sweep_temporary(store_dir: Path) -> list[str]:
    """Remove half-built entries `<key>.tmp-*` whose lock, `<key>.lock` beside them, is free; return their names."""
    swept = []
    for entry in _list(store_dir):
        key, temporary, _ = entry.name.partition(_TEMPORARY)
        if temporary and not entry.name.startswith(_DEAD) and _bury(entry, store_dir / f"{key}.lock"):
            swept.append(entry.name)
        elif entry.name.startswith(_DEAD):
            shutil.rmtree(entry, ignore_errors=True)
    return swept


def _list(directory: Path) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink())
    except FileNotFoundError:
        return []


def _bury(entry: Path, lock: Path) -> bool:
    """Rename the directory while its lock is ours, so that one sweeper wins and nobody comes to life in it."""
    grave = entry.with_name(f"{_DEAD}{os.urandom(4).hex()}")
    with _taken(lock) as taken:
        if not taken:
            return False
        try:
            entry.rename(grave)
        except OSError:
            return False
    shutil.rmtree(grave, ignore_errors=True)
    return True


@contextmanager
def _taken(lock: Path) -> Iterator[bool]:
    try:
        # Created if missing: a process that was killed, or is just now, between making the directory and its lock.
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
