"""What a stream needs of its session, and what it keeps of what came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from pytest_fcvm.errors import FcvmError, GuestError
from pytest_fcvm.guest.frames import PROTOCOL_WINDOW

__all__ = ["CallFailed", "Inbound", "Link"]


class CallFailed(GuestError):
    """The agent could not do what it was asked for; `errno` is the guest's."""

    errno: int = 0


class Link(Protocol):
    """What a stream needs of its session."""

    lock: threading.Lock
    reason: FcvmError | None

    def transmit(self, frame: bytes) -> None:
        """Send a frame. The lock is held."""

    def retire(self, stream_id: int) -> None:
        """Forget a stream that has ended. The lock is held."""

    def note(self, watcher: Callable[[], object]) -> None:
        """Let a watcher be called soon, on the session's thread. The lock is held."""

    def check_may_wait(self) -> None:
        """Raise UsageProblem on the thread that everybody waits for. The lock is held."""

    def raise_reason(self) -> None:
        """Raise why the session ended. The lock is held."""

    def evidence(self) -> Mapping[str, str]:
        """Return what a person wants to know about the session after a timeout. The lock is held."""
        ...


class Inbound:
    """What came on one channel and was not read yet."""

    __slots__ = ("bounded", "chunks", "collecting", "credit", "discarding", "ended", "lost", "owed")

    def __init__(self) -> None:
        self.chunks: deque[memoryview] = deque()
        self.credit = PROTOCOL_WINDOW  # what the agent may still send
        self.owed = 0  # read and not granted again yet
        self.ended = False
        self.collecting = False  # keep everything, however much it is
        self.discarding = False  # keep nothing
        self.bounded = False  # keep the last window
        self.lost = 0  # bytes that were not kept for it

    def keep(self, data: memoryview) -> None:
        """Add what came."""
        if self.bounded:
            whole = b"".join((*self.chunks, data))
            self.chunks.clear()
            self.lost += max(0, len(whole) - PROTOCOL_WINDOW)
            data = memoryview(whole)[-PROTOCOL_WINDOW:]
        if not self.discarding:
            self.chunks.append(data)
