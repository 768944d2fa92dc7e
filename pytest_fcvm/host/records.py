"""What was found out about this machine, kept between runs and shared by the processes of one."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.files import SEALED
from pytest_fcvm.host.own import os

__all__ = ["Digests", "boot_id", "open_record", "stamp"]

Record = dict[str, object]


@contextmanager
def open_record(path: Path) -> Iterator[Record]:
    """Yield the record in a JSON file, alone among all processes, and write it back if it was changed.

    A file that cannot be read as a record counts as empty, and one that cannot be written stays as it is: everything in
    it can be found out again.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in SEALED:
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
            temporary = path.with_suffix(".new")
            with suppress(OSError):  # no room for it: it is found out again
                temporary.write_text(after)
                temporary.replace(path)
    finally:
        if lock >= 0:
            os.close(lock)


def boot_id() -> str:
    """Return what identifies this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def stamp(path: Path) -> str:
    """Return what changes when a file's contents do. Raise OSError."""
    found = path.stat()
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


class Digests:
    """SHA-256 of large files, computed again only when their stamp differs. `record` keeps them."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def of(self, path: Path) -> str:
        """Return the digest of a file's contents. Raise HostError when it cannot be read."""
        try:
            now = stamp(path)
            known = self._record.get(str(path))
            if isinstance(known, list) and known[:1] == [now]:
                return str(known[1])
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise HostError(f"{path} cannot be read: {error.strerror}") from error
        self._record[str(path)] = [now, digest]
        return digest


def _read(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
