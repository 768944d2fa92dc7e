"""The workload's output on the host: a file that grows as it comes, and a way to wait for it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

from pytest_fcvm.host.clock import Deadline, wait_on

__all__ = ["WorkloadLog", "tail"]

_TAIL_BYTES = 16 * 1024
_TAIL_LINES = 100


class WorkloadLog:
    """What a workload printed: the base's part up to the snapshot, then this machine's own, appended by `append`."""

    def __init__(self, path: Path, before: Path | None = None) -> None:
        self._file = path.open("w+b", buffering=0)
        self._before = before
        self._news = threading.Condition()
        self._size = 0
        self._closed = False

    def append(self, data: bytes) -> None:
        """Add output and wake those who wait for it."""
        with self._news:
            if not self._closed:
                self._file.write(data)
                self._size += len(data)
                self._news.notify_all()

    def wake(self) -> None:
        """Make waiters look again, because the machine's state has changed."""
        with self._news:
            self._news.notify_all()

    def content(self) -> bytes:
        """Return everything so far."""
        return self._earlier() + self._own(0)

    def search(self, pattern: re.Pattern[str], deadline: Deadline, give_up: Callable[[], bool]) -> re.Match[str] | None:
        """Wait for a line that matches, old ones too; None at the deadline or when told to give up."""
        if match := _search_lines(pattern, self._earlier()):
            return match
        offset = 0
        while True:
            ended = give_up()
            data = self._own(offset)
            if match := _search_lines(pattern, data):
                return match
            if ended or deadline.expired:
                return None
            offset, seen = offset + data.rfind(b"\n") + 1, offset + len(data)
            with self._news:
                wait_on(self._news, lambda seen=seen: self._size > seen or give_up(), deadline)  # type: ignore[misc]

    def close(self) -> None:
        """Close the file; later output is dropped."""
        with self._news:
            self._closed = True
            self._file.close()
            self._news.notify_all()

    def _earlier(self) -> bytes:
        return self._before.read_bytes() if self._before and self._before.exists() else b""

    def _own(self, offset: int) -> bytes:
        with self._news:
            if self._closed:
                return b""
            self._file.seek(offset)
            data = self._file.read(self._size - offset)
            self._file.seek(self._size)
        return data or b""


def _search_lines(pattern: re.Pattern[str], data: bytes) -> re.Match[str] | None:
    for line in data.decode("utf-8", "replace").splitlines():
        if match := pattern.search(line):
            return match
    return None


def tail(data: bytes) -> str:
    """Return the last lines as text for a report: at most 100 lines and 16 KiB, control bytes escaped."""
    text = data[-_TAIL_BYTES:].decode("utf-8", "backslashreplace")
    lines = text.splitlines()[-_TAIL_LINES:]
    return "\n".join("".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line) for line in lines)
