"""The workload's output on the host: a file that grows as it comes, and a way to wait for it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from pytest_fcvm.host.clock import Deadline, wait_on
from pytest_fcvm.host.own import os
from pytest_fcvm.model.text import TAIL_BYTES, printable_tail

__all__ = ["WorkloadLog", "tail"]

_CHUNK_BYTES = 1 << 20  # of a log in memory at a time; a line that is longer is searched in pieces
_QUIET_S = 0.2  # a line without its end that grows no more is taken for a prompt
_SPAN_CHARS = 256 * 1024  # how far apart the ends of a match over several lines may lie
# What lets an expression match a newline; without any of it, lines that did not match once are not searched again.
_SPANS = re.compile(r"\n|\\[nsWDxuUN0]|\[\^|\(\?[a-zA-Z]*s")


class WorkloadLog:
    """What a workload printed: the base's part up to the snapshot, then the clone's own, added by `append`."""

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
        """Wake those who wait: the state of the VM has changed."""
        with self._news:
            self._news.notify_all()

    def content(self) -> bytes:
        """Return everything so far."""
        return b"".join(self._chunks())

    def end(self) -> bytes:
        """Return the last bytes so far, enough for `tail`."""
        kept = b""
        for chunk in self._chunks(TAIL_BYTES):
            kept = (kept + chunk)[-TAIL_BYTES:]
        return kept

    def save(self, path: Path) -> None:
        """Write everything so far to a file."""
        with path.open("wb") as file:
            file.writelines(self._chunks())

    def search(
        self, pattern: re.Pattern[str], deadline: Deadline, give_up: Callable[[], bool], *, times: int = 1
    ) -> re.Match[str] | None:
        """Wait until a pattern has matched so many times, old output counted too, and return the last of the matches.

        None at the deadline, when `give_up` says so, or once the log is closed. A line that has not ended counts when
        nothing came for a moment: half of one matches what the whole does not.
        """
        window, offset, quiet = _Window(pattern, times), 0, False
        for chunk in self._earlier():
            window.add(chunk)
        while True:
            ended = self._closed or give_up() or deadline.expired
            data = self._own(offset)
            goes_on = len(data) == _CHUNK_BYTES
            whole = data.rfind(b"\n") + 1 or (len(data) if goes_on else 0)
            window.add(data[:whole])
            offset += whole
            if match := window.find(data[whole:] if quiet or ended else b""):
                return match
            if goes_on:
                continue
            if ended:
                return None
            left = len(data) - whole
            wait = _sooner(deadline, _QUIET_S) if left and not quiet else deadline
            quiet = not self._wait_for_more(offset + left, wait, give_up)

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

    def _earlier(self) -> Iterator[bytes]:
        """Yield the base's part, in pieces that end where lines do as far as they can."""
        if self._before and self._before.exists():
            with self._before.open("rb") as file:
                while lines := b"".join(file.readlines(_CHUNK_BYTES)):
                    yield lines

    def _chunks(self, last: int | None = None) -> Iterator[bytes]:
        """Yield everything so far, or the last bytes of the base's part and of the clone's own."""
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


class _Window:
    """The end of what was printed, as far back as a match may begin, and how many matches are still wanted."""

    def __init__(self, pattern: re.Pattern[str], times: int) -> None:
        self._pattern, self._left = re.compile(pattern.pattern, pattern.flags | re.MULTILINE), times
        self._spans = bool(pattern.flags & re.DOTALL or _SPANS.search(pattern.pattern))
        self._text, self._start = "", 0  # where the next match may begin
        self._found: re.Match[str] | None = None

    def add(self, data: bytes) -> None:
        """Add whole lines and count the matches in them."""
        self._text += data.decode("utf-8", "replace")
        while self._left and (match := self._pattern.search(self._text, self._start)):
            self._found, self._left = match, self._left - 1
            self._start = max(match.end(), match.start() + 1)
        if not self._spans:
            self._start = len(self._text)
        keep_from = max(self._start, len(self._text) - _SPAN_CHARS)
        cut = self._text.rfind("\n", 0, keep_from) + 1
        self._text, self._start = self._text[cut:], max(0, self._start - cut)

    def find(self, open_line: bytes) -> re.Match[str] | None:
        """Return the last match that was wanted, the line that has not ended counted too, or None."""
        if not self._left:
            return self._found
        matches = self._pattern.finditer(self._text + open_line.decode("utf-8", "replace"), self._start)
        return next(islice(matches, self._left - 1, None), None) if open_line else None


def tail(data: bytes) -> str:
    """Return the last lines as text for a report: at most 100 lines and 16 KiB, control characters escaped."""
    return printable_tail(data[-TAIL_BYTES:].decode("utf-8", "backslashreplace"))
