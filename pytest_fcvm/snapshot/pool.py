"""Clones ahead of the tests: alive, proven, warm, then frozen and stopped. A test waits 2 to 3 ms for one.

A pooled clone has its identity before the workload's first instruction, as every clone has. What it did since (its
readiness was proven) has warmed its code: under emulation a guest's first pass through any code costs ten times the
second. Stopped, it takes no processor time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pytest_fcvm.clone.machine import Machine
from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.clock import Deadline, wait_on
from pytest_fcvm.host.threads import ServiceThread

__all__ = ["Depth", "Pool", "Pooled"]

_MOST = 4  # clones ahead of one snapshot's tests, where the number adapts
_IDLE_TAKES = 16
_MAKE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A machine that was made ahead. `asleep`: frozen and stopped; else it runs, because a test was waiting for it."""

    machine: Machine
    name: str
    asleep: bool


class Depth:
    """How many clones to keep ahead: a fixed number, or one that follows the tests.

    One is enough while a test takes longer than the making of a clone. A test that had to wait shows a burst, and one
    more is kept; one that was always left over is given up.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._adapts = fixed is None
        self.wanted = 1 if fixed is None else fixed
        self._left_over = 0

    def note_take(self, *, waited: bool, left: int) -> None:
        """Learn from a test that took a clone: whether it had to wait, and how many were left."""
        if not self._adapts:
            return
        self._left_over = self._left_over + 1 if left and not waited else 0
        if waited:
            self.wanted = min(self.wanted + 1, _MOST)
        elif self._left_over >= _IDLE_TAKES:
            self.wanted, self._left_over = max(1, self.wanted - 1), 0


class Pool:
    """The clones ahead of one snapshot's tests, made by one thread that lives while it has work.

    `make` brings up a clone; it asks the function it gets whether a test is waiting, and then leaves out what only
    saves later time. It raises FcvmError when there is no room or the clone does not come to life: the pool then stays
    as it is until the next clone is taken, and who needs one starts it and is told the reason.
    """

    def __init__(self, make: Callable[[Callable[[], bool]], Pooled], depth: Depth) -> None:
        self._make, self._depth = make, depth
        self._changed = threading.Condition()
        self._ready: deque[Pooled] = deque()
        self._filling = self._closed = False
        self._waiting = 0
        self.lost = 0

    def take(self) -> Pooled | None:
        """Return a clone, waiting for one that is just being made. None when there is none: start one yourself."""
        with self._changed:
            waited = False
            pooled = self._pop()
            if pooled is None and self._filling:
                waited = True
                self._waiting += 1
                try:
                    wait_on(self._changed, lambda: self._ready or not self._filling, Deadline(_MAKE_S))
                finally:
                    self._waiting -= 1
                pooled = self._pop()
            self._depth.note_take(waited=waited or pooled is None, left=len(self._ready))
            return pooled

    def refill(self) -> None:
        """Let the thread make what is missing, unless it is at it."""
        with self._changed:
            if self._closed or self._filling or len(self._ready) >= self._depth.wanted:
                return
            self._filling = True
        ServiceThread(self._fill, name="fcvm-pool").start()

    def drain(self) -> None:
        """Give back what is there: somebody else needs the room."""
        with self._changed:
            given_back, self._ready = self._ready, deque()
        for pooled in given_back:
            _discard(pooled.machine)

    def close(self) -> None:
        """Give everything back; no other clone will follow."""
        with self._changed:
            self._closed = True
        self.drain()

    def _pop(self) -> Pooled | None:
        while self._ready:
            pooled = self._ready.popleft()
            if pooled.machine.ended is None:
                return pooled
            self.lost += 1  # it died while nobody looked: the test gets the next one
            _discard(pooled.machine)
        return None

    def _is_wanted(self) -> bool:
        return self._waiting > 0

    def _fill(self) -> None:
        more = True
        while more:
            pooled: Pooled | None = None
            try:
                with suppress(FcvmError):
                    pooled = self._make(self._is_wanted)
            finally:
                more = self._keep(pooled)

    def _keep(self, pooled: Pooled | None) -> bool:
        """Take in what was made, or not; return whether another one is missing."""
        with self._changed:
            kept = pooled is not None and not self._closed
            if pooled is not None and kept:
                self._ready.append(pooled)
            self._filling = kept and len(self._ready) < self._depth.wanted
            self._changed.notify_all()
            more = self._filling
        if pooled is not None and not kept:
            _discard(pooled.machine)
        return more


def _discard(machine: Machine) -> None:
    with suppress(FcvmError):
        machine.close()
