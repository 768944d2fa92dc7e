"""The workload's output on the host: a file that grows as it comes, and a way to wait for it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from pytest_fcvm.host.clock import Deadline, wait_on
from pytest_fcvm.host.own import os

__all__ = ["WorkloadLog", "tail"]

_TAIL_BYTES = 16 * 1024
_TAIL_LINES = 100
_CHUNK_BYTES = 1 << 20  # of a log in memory at a time; a line that is longer is searched in pieces
_QUIET_S = 0.2  # a line without its end that grows no more is taken for a prompt


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
        return b"".join(self._chunks())

    def end(self) -> bytes:
        """Return the last bytes so far, enough for `tail`."""
        kept = b""
        for chunk in self._chunks(_TAIL_BYTES):
            kept = (kept + chunk)[-_TAIL_BYTES:]
        return kept

    def save(self, path: Path) -> None:
        """Write everything so far to a file."""
        with path.open("wb") as file:
            file.writelines(self._chunks())

    def search(self, pattern: re.Pattern[str], deadline: Deadline, give_up: Callable[[], bool]) -> re.Match[str] | None:
        """Wait for a line that matches, old ones too; None at the deadline, when told to give up, or once it is closed.

        A line that has not ended counts when nothing came for a moment: half of one matches what the whole does not.
        """
        if match := self._search_earlier(pattern):
            return match
        offset, quiet = 0, False
        while True:
            ended = self._closed or give_up() or deadline.expired
            data = self._own(offset)
            goes_on = len(data) == _CHUNK_BYTES
            whole = data.rfind(b"\n") + 1 or (len(data) if goes_on else 0)
            if match := _search_lines(pattern, data if not goes_on and (quiet or ended) else data[:whole]):
                return match
            if goes_on:
                offset += whole
                continue
            if ended:
                return None
            open_line = len(data) > whole and not quiet
            quiet = not self._wait_for_more(
                offset + len(data), _sooner(deadline, _QUIET_S) if open_line else deadline, give_up
            )
            offset += whole

    @property
    def size_bytes(self) -> int:
        """Return how much has been printed, without what the base printed."""
        return self._size

    def close(self) -> None:
        """Close the file; later output is dropped."""
        with self._news:
            self._closed = True
            self._file.close()
            self._news.notify_all()

    def _wait_for_more(self, seen: int, deadline: Deadline, give_up: Callable[[], bool]) -> bool:
        with self._news:
            return wait_on(self._news, lambda: self._closed or self._size > seen or give_up(), deadline)

    def _search_earlier(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        if not self._before or not self._before.exists():
            return None
        with self._before.open("rb") as file:
            lines = iter(lambda: file.readline(_CHUNK_BYTES), b"")
            return next((match for line in lines if (match := _search_lines(pattern, line))), None)

    def _chunks(self, last: int | None = None) -> Iterator[bytes]:
        """Yield everything so far, or the last bytes of the base's part and of the machine's own."""
        if self._before and self._before.exists():
            with self._before.open("rb") as file:
                if last is not None:
                    file.seek(max(0, self._before.stat().st_size - last))
                yield from iter(lambda: file.read(_CHUNK_BYTES), b"")
        offset = 0 if last is None else max(0, self._size - last)
        while data := self._own(offset):
            yield data
            offset += len(data)

    def _own(self, offset: int) -> bytes:
        """Return what there is from an offset on, at most a chunk."""
        with self._news:
            if self._closed:
                return b""
            return os.pread(self._file.fileno(), min(_CHUNK_BYTES, self._size - offset), offset)


def _sooner(deadline: Deadline, timeout_s: float) -> Deadline:
    remaining = deadline.remaining()
    return Deadline(timeout_s if remaining is None else min(timeout_s, remaining))


def _search_lines(pattern: re.Pattern[str], data: bytes) -> re.Match[str] | None:
    for line in data.decode("utf-8", "replace").splitlines():
        if match := pattern.search(line):
            return match
    return None


def tail(data: bytes) -> str:
    """Return the last lines as text for a report: at most 100 lines and 16 KiB, control bytes escaped."""
    text = data[-_TAIL_BYTES:].decode("utf-8", "backslashreplace")
    lines = text.splitlines()[-_TAIL_LINES:]
    escaped = ("".join(c if c.isprintable() or c == "\t" else f"\\x{ord(c):02x}" for c in line) for line in lines)
    return "\n".join(escaped)[-_TAIL_BYTES:]  # an escaped byte takes four
