"""Deadlines that hold when a test patches `time`: this module reads CLOCK_MONOTONIC by `clock_gettime`.

freezegun and time-machine stop `time.monotonic`, but not `clock_gettime(CLOCK_MONOTONIC)`. The interpreter itself keeps
a lock's timeout. This package never uses `Condition.wait_for`, because that reads `time.monotonic`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from pytest_fcvm.host.own import CLOCK_MONOTONIC, clock_gettime

__all__ = ["Deadline", "monotonic", "wait_on", "wait_until"]

T = TypeVar("T")


def monotonic() -> float:
    """Return the seconds since boot. No test library can stop this clock."""
    return clock_gettime(CLOCK_MONOTONIC)


class Deadline:
    """The time `timeout_s` from now; None for no deadline."""

    __slots__ = ("_end", "timeout_s")

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._end = None if timeout_s is None else monotonic() + timeout_s

    def remaining(self) -> float | None:
        """Return the seconds that are left, 0.0 after the deadline, None without a deadline."""
        if self._end is None:
            return None
        return max(0.0, self._end - monotonic())

    @property
    def expired(self) -> bool:
        """Say whether the deadline has passed."""
        return self.remaining() == 0.0

    def __str__(self) -> str:
        return "no deadline" if self.timeout_s is None else f"{self.timeout_s:g} s"


def wait_on(condition: threading.Condition, predicate: Callable[[], T], deadline: Deadline) -> T:
    """Wait on a held condition until the predicate is true. Return its last value, false at the deadline."""
    while not (value := predicate()):
        remaining = deadline.remaining()
        if remaining == 0.0:
            return value
        # A lock's timeout must not exceed threading.TIMEOUT_MAX. The loop repeats for a longer wait.
        condition.wait(None if remaining is None else min(remaining, threading.TIMEOUT_MAX))
    return value


def wait_until(
    predicate: Callable[[], T],
    deadline: Deadline,
    *,
    interval_s: float = 0.005,
    longest_interval_s: float = 0.25,
    wake: threading.Event | None = None,
) -> T:
    """Poll the predicate until it is true or the deadline has passed, and return its last value.

    Use it where there is no event to wait for. The interval doubles up to `longest_interval_s`. Set `wake` to poll at
    once; this function clears `wake`.
    """
    wake = wake or threading.Event()
    while True:
        wake.clear()  # before the call, so that a `wake` during the call causes the next one
        remaining = deadline.remaining()
        if (value := predicate()) or remaining == 0.0:
            return value
        wake.wait(interval_s if remaining is None else min(interval_s, remaining))
        interval_s = min(2 * interval_s, longest_interval_s)
