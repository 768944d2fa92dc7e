"""Facts about this host, kept between runs and shared by the processes of one run."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.files import READ_ONLY_ERRORS, replace_file, stamp_of
from pytest_fcvm.host.own import os

__all__ = ["Digests", "Record", "boot_id", "facts_about", "open_record", "stamps_of"]

Record = dict[str, object]


@contextmanager
def open_record(path: Path) -> Iterator[Record]:
    """Yield the record in a JSON file, locked against all other processes. Write the record back if it was changed.

    A file that cannot be read counts as empty. A failed write is ignored: every fact can be found out again. Raise
    HostError where the file's directory cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in READ_ONLY_ERRORS:
            raise HostError(f"{path} cannot be made: {error.strerror}", hint="name another --fcvm-cache-dir") from error
        lock = -1
    try:
        if lock >= 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
        record = _read(path)
        before = json.dumps(record, sort_keys=True)
        yield record
        after = json.dumps(record, sort_keys=True)
        if after != before:
            with suppress(OSError):
                replace_file(path, after)
    finally:
        if lock >= 0:
            os.close(lock)


def facts_about(program: Path, record_file: Path, find: Callable[[Path], Record]) -> Record:
    """Return what `find` returned for a program, from the record as long as the files of its `stamps` are unchanged.

    `stamps` is one of the facts, made by `stamps_of`.
    """
    with open_record(record_file) as record:
        known = record.get(str(program))
        if not (isinstance(known, dict) and _are_unchanged(known.get("stamps"))):
            known = record[str(program)] = find(program)
    return known


def stamps_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """Return the stamps of files by their paths. Raise OSError."""
    return {str(path): stamp_of(path) for path in files}


def boot_id() -> str:
    """Return what identifies this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Digests:
    """SHA-256 of large files, computed again only when a file's stamp has changed. `record` keeps the digests."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def of(self, path: Path) -> str:
        """Return the digest of a file's content. Raise HostError when it cannot be read."""
        try:
            now = stamp_of(path)
            known = self._record.get(str(path))
            if isinstance(known, list) and known[:1] == [now]:
                return str(known[1])
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise HostError(f"{path} cannot be read: {error.strerror}") from error
        self._record[str(path)] = [now, digest]
        return digest


def _are_unchanged(stamps: object) -> bool:
    with suppress(OSError):
        return isinstance(stamps, dict) and bool(stamps) and stamps_of(map(Path, stamps)) == stamps
    return False


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
