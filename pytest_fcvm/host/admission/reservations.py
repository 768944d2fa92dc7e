"""The reservations of each process on this host: all processes can read them, and they end with their process.

Each process has one file, `<pid>-<random>`, which it locks as long as it lives. The lock is fcntl's and not flock's: a
test's forked child does not inherit it, so the reservations of a SIGKILLed pytest end at once. Closing *any* descriptor
of a file drops the process's locks on that file. So a process has one `Reservations` for a directory, and opens its own
file once.

    0000000003 0000000768 0000000001        clones, MiB, waiting requests of tests that already hold a clone
    {"holder": "test_a.py::test_x", "mem_mib": 256}        one line per clone
"""

from __future__ import annotations

import fcntl
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from pytest_fcvm.host.files import create_private
from pytest_fcvm.host.own import getpid, os

__all__ = ["Holder", "Reservations", "Totals", "close_reservations", "open_reservations"]

_NAME = re.compile(r"(\d+)-[0-9a-f]{8}")
_HEAD_BYTES = 33
_LOCK = "lock"


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over all processes."""

    clones: int = 0
    mem_mib: int = 0
    waiting_again: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            clones=self.clones + other.clones,
            mem_mib=self.mem_mib + other.mem_mib,
            waiting_again=self.waiting_again + other.waiting_again,
        )


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The holder of one reservation."""

    holder: str
    pid: int
    mem_mib: int

    def __str__(self) -> str:
        return f"{self.holder} (pid {self.pid}, {self.mem_mib} MiB)"


class Reservations:
    """This process's reservations, and a view of all others. Get it from `open_reservations`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self.owner = getpid()
        self._directory = directory
        self._mutex = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._threads = threading.RLock()
        self._name = f"{self.owner}-{os.urandom(4).hex()}"
        self._file = -1
        self._lines: dict[int, tuple[int, bytes]] = {}
        self._waiting_again = 0
        self._numbers = count(1)
        self.users: set[object] = set()

    def close(self) -> None:
        """Remove our file and close the descriptors. Later releases have no effect. In a forked child, close only."""
        with self._threads:
            mutex, self._mutex, file, self._file = self._mutex, -1, self._file, -1
            if file >= 0:
                if self.owner == getpid():
                    (self._directory / self._name).unlink(missing_ok=True)
                os.close(file)
            if mutex >= 0:
                os.close(mutex)

    @contextmanager
    def try_lock(self) -> Iterator[bool]:
        """Lock the reservations of all processes if they are unlocked. Yield whether the lock is ours."""
        with self._threads:
            try:
                fcntl.flock(self._mutex, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                fcntl.flock(self._mutex, fcntl.LOCK_UN)

    def totals(self) -> Totals:
        """Return the sums over all live processes, and remove the files of dead ones. Hold the lock."""
        result = self._own()
        for file, _ in self._others():
            clones, mem_mib, again = (int(part) for part in (os.read(file, _HEAD_BYTES).split() or (0, 0, 0)))
            result += Totals(clones=clones, mem_mib=mem_mib, waiting_again=again)
        return result

    def own_clones(self) -> int:
        """Return how many clones this process holds."""
        return len(self._lines)

    def holders(self) -> list[Holder]:
        """Return the holders of all reservations. Hold the lock."""
        texts = [(self.owner, b"".join(line for _, line in self._lines.values()))]
        texts += [(pid, os.read(file, 1 << 20)[_HEAD_BYTES:]) for file, pid in self._others()]
        found = []
        for pid, text in texts:
            with suppress(ValueError, KeyError):  # a file that is being written
                rows = [json.loads(line) for line in text.splitlines()]
                found += [Holder(holder=row["holder"], pid=pid, mem_mib=row["mem_mib"]) for row in rows]
        return found

    def add(self, holder: str, mem_mib: int) -> int:
        """Add a reservation and return its number. Hold the lock."""
        with self._threads:
            number = next(self._numbers)
            row = json.dumps({"holder": holder, "mem_mib": mem_mib})
            self._lines[number] = (mem_mib, row.encode() + b"\n")
            try:
                self._write()
            except BaseException:
                del self._lines[number]  # the caller does not get the number
                raise
            return number

    def release(self, number: int) -> None:
        """Remove a reservation. This needs no lock: the file is consistent before and after."""
        with self._threads:
            if self._lines.pop(number, None) is not None and self._file >= 0:
                self._write()

    def wait_again(self, change: int) -> None:
        """Change the number of waiting requests that go before first clones. Hold the lock to increase it."""
        with self._threads:
            self._waiting_again += change
            self._write()

    def read_note(self, name: str) -> int:
        """Return a number that all processes share, 0 if it was never written. Hold the lock."""
        with suppress(OSError, ValueError):
            return int((self._directory / name).read_bytes())
        return 0

    def write_note(self, name: str, value: int) -> None:
        """Set a number that all processes share. Hold the lock."""
        (self._directory / name).write_bytes(b"%d" % value)

    def _own(self) -> Totals:
        mem_mib = sum(mem_mib for mem_mib, _ in self._lines.values())
        return Totals(clones=len(self._lines), mem_mib=mem_mib, waiting_again=self._waiting_again)

    def _write(self) -> None:
        if self._file < 0:
            self._file = create_private(self._directory / self._name)
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        own = self._own()
        head = b"%010d %010d %010d\n" % (own.clones, own.mem_mib, own.waiting_again)
        text = head + b"".join(line for _, line in self._lines.values())
        os.pwrite(self._file, text, 0)
        os.ftruncate(self._file, len(text))

    def _others(self) -> Iterator[tuple[int, int]]:
        """Yield an open descriptor of each other live process's file, and the process id."""
        for path in self._directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or path.name == self._name:
                continue
            try:
                file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                if _is_dead(file):
                    path.unlink(missing_ok=True)
                else:
                    yield file, int(match[1])
            finally:
                os.close(file)


_reservations: dict[Path, Reservations] = {}
_opening = threading.Lock()


def open_reservations(directory: Path, user: object) -> Reservations:
    """Return this process's reservations in a directory. `user` must call `close_reservations`. Raise OSError.

    A forked child gets its own.
    """
    with _opening:
        known = _reservations.get(directory)
        if known is None or known.owner != getpid():
            known = _reservations[directory] = Reservations(directory)
        known.users.add(user)
        return known


def close_reservations(directory: Path, user: object) -> None:
    """Close this process's reservations in a directory after the last user's call. Idempotent."""
    with _opening:
        known = _reservations.get(directory)
        if known is None or user not in known.users:
            return
        known.users.discard(user)
        if not known.users:
            del _reservations[directory]
            known.close()


def _is_dead(file: int) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
