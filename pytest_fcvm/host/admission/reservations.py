"""What each process of this host holds, readable by all and void when its process dies.

One file per process, `<pid>-<random>`, locked by the process as long as it lives. The lock is fcntl's, not flock's: a
forked child of a test does not inherit it, so a SIGKILLed pytest counts as dead at once. It has a sharp edge: closing
*any* descriptor of a file drops the process's locks on it. Hence one ledger per process and directory, and nobody opens
their own file twice.

    0000000003 0000000768 0000000001        clones, MiB, requests that wait though their test holds a clone already
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
    """Sums over processes."""

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
    """Who holds a clone."""

    holder: str
    pid: int
    mem_mib: int

    def __str__(self) -> str:
        return f"{self.holder} (pid {self.pid}, {self.mem_mib} MiB)"


class Reservations:
    """This process's own page, and a look at those of the others. Get it from `open_reservations`."""

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
        """Remove the page and close the files; what is struck out later counts no more. In a forked child, close."""
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
        """Hold all processes' pages still, if nobody else does just now; yield whether."""
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
        """Return the sums over all live processes and drop the pages of dead ones. The lock must be held."""
        result = self._own()
        for file, _ in self._others():
            clones, mem_mib, again = (int(part) for part in (os.read(file, _HEAD_BYTES).split() or (0, 0, 0)))
            result += Totals(clones=clones, mem_mib=mem_mib, waiting_again=again)
        return result

    def own_clones(self) -> int:
        """Return how many clones this process holds."""
        return len(self._lines)

    def holders(self) -> list[Holder]:
        """Return who holds what. The lock must be held."""
        texts = [(self.owner, b"".join(line for _, line in self._lines.values()))]
        texts += [(pid, os.read(file, 1 << 20)[_HEAD_BYTES:]) for file, pid in self._others()]
        found = []
        for pid, text in texts:
            with suppress(ValueError, KeyError):  # a page in the middle of being written is only told less of
                rows = [json.loads(line) for line in text.splitlines()]
                found += [Holder(holder=row["holder"], pid=pid, mem_mib=row["mem_mib"]) for row in rows]
        return found

    def add(self, holder: str, mem_mib: int) -> int:
        """Enter a clone and return the number to strike it out by. The lock must be held."""
        with self._threads:
            number = next(self._numbers)
            row = json.dumps({"holder": holder, "mem_mib": mem_mib})
            self._lines[number] = (mem_mib, row.encode() + b"\n")
            try:
                self._write()
            except BaseException:
                del self._lines[number]  # nobody has its number
                raise
            return number

    def remove(self, number: int) -> None:
        """Strike a clone out. Needs no lock: a reader sees it before or after."""
        with self._threads:
            if self._lines.pop(number, None) is not None and self._file >= 0:
                self._write()

    def wait_again(self, change: int) -> None:
        """Count the requests that others must let pass. The lock must be held to count up."""
        with self._threads:
            self._waiting_again += change
            self._write()

    def read_note(self, name: str) -> int:
        """Return a number that all processes share, 0 if nobody wrote it. The lock must be held."""
        with suppress(OSError, ValueError):
            return int((self._directory / name).read_bytes())
        return 0

    def write_note(self, name: str, value: int) -> None:
        """Set a number that all processes share. The lock must be held."""
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
        """Yield an open descriptor and the process id of every other live page."""
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
    """Return this process's ledger in a directory, for a user who calls `close_reservations`. Raise OSError.

    A forked child gets one of its own.
    """
    with _opening:
        known = _reservations.get(directory)
        if known is None or known.owner != getpid():
            known = _reservations[directory] = Reservations(directory)
        known.users.add(user)
        return known


def close_reservations(directory: Path, user: object) -> None:
    """Close this process's ledger in a directory once nobody uses it any more. Idempotent."""
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
