"""The part of a session that a stream uses, and what a stream keeps of its input."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from pytest_fcvm.errors import FcvmError, GuestError
from pytest_fcvm.guest.frames import PROTOCOL_WINDOW

__all__ = ["CallFailed", "Inbound", "Link"]


class CallFailed(GuestError):
    """The agent could not do what was requested. `errno` is the guest's."""

    errno: int = 0


class Link(Protocol):
    """The part of a session that a stream uses."""

    lock: threading.Lock
    reason: FcvmError | None

    def transmit(self, frame: bytes) -> None:
        """Send a frame. The lock is held."""

    def retire(self, stream_id: int) -> None:
        """Forget a stream that has ended. The lock is held."""

    def schedule(self, watcher: Callable[[], object]) -> None:
        """Have a watcher called soon, on the session's thread. The lock is held."""

    def check_may_wait(self) -> None:
        """Raise UsageProblem on the session's own thread. The lock is held."""

    def raise_reason(self) -> None:
        """Raise why the session ended. The lock is held."""

    def evidence(self) -> Mapping[str, str]:
        """Return the state of the session, as evidence for a timeout. The lock is held."""
        ...


class Inbound:
    """The bytes of one channel that have come and are not read yet."""

    __slots__ = ("bounded", "chunks", "collecting", "credit", "discarding", "ended", "lost", "owed")

    def __init__(self) -> None:
        self.chunks: deque[memoryview] = deque()
        self.credit = PROTOCOL_WINDOW  # bytes that the agent may still send
        self.owed = 0  # bytes that were read and not granted again yet
        self.ended = False
        self.collecting = False  # keep everything, without a limit
        self.discarding = False  # keep nothing
        self.bounded = False  # keep the last window
        self.lost = 0  # bytes that `bounded` has dropped

    def keep(self, data: memoryview) -> None:
        """Add bytes."""
        if self.bounded:
            whole = b"".join((*self.chunks, data))
            self.chunks.clear()
            self.lost += max(0, len(whole) - PROTOCOL_WINDOW)
            data = memoryview(whole)[-PROTOCOL_WINDOW:]
        if not self.discarding:
            self.chunks.append(data)
