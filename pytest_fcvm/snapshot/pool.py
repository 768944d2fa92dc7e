"""Clones ahead of the tests: alive, proven, warm, then frozen and stopped. A test waits 2 to 3 ms for one.

A pooled clone has its identity before the workload's first instruction, as every clone has. What it did since (its
readiness was proven) has warmed its code: under emulation a guest's first pass through any code costs ten times the
second. Stopped, it takes no CPU time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pytest_fcvm.clone.running import RunningVm
from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.admission.admission import NoRoomToPrewarm
from pytest_fcvm.host.clock import Deadline, wait_on
from pytest_fcvm.host.threads import Crew, ServiceThread

__all__ = ["Depth", "Pool", "Pooled"]

_MOST = 4  # clones ahead of one snapshot's tests, where the number adapts
_IDLE_TAKES = 16
_MAKE_S = 120.0
_CLOSE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A machine that was made ahead. `asleep`: frozen and stopped; else it runs, because a test was waiting for it."""

    running: RunningVm
    name: str
    paused: bool


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
    """The clones ahead of one snapshot's tests, made by threads that live while they have work, `makers` at once.

    `make` brings up a clone; it asks the function it gets whether a test is waiting, and then leaves out what only
    saves later time. It raises FcvmError when there is no room or the clone does not come to life: the pool then stays
    as it is until the next clone is taken, and who needs one starts it and is told the reason. `interrupt` makes every
    `make` that is under way end soon.
    """

    def __init__(
        self,
        make: Callable[[Callable[[], bool]], Pooled],
        depth: Depth,
        makers: int = 1,
        interrupt: Callable[[], object] = lambda: None,
    ) -> None:
        self._make, self._depth, self._makers, self._interrupt = make, depth, makers, interrupt
        self._threads = Crew()
        self._changed = threading.Condition()
        self._ready: deque[Pooled] = deque()
        self._closed = False
        self._making = self._waiting = 0
        self.lost = 0
        self.fault: FcvmError | None = None

    def take(self) -> Pooled | None:
        """Return a clone, waiting for one that is just being made. None when there is none: start one yourself."""
        with self._changed:
            waited = False
            pooled = self._pop()
            if pooled is None and self._making:
                waited = True
                self._waiting += 1
                try:
                    wait_on(self._changed, lambda: self._ready or not self._making, Deadline(_MAKE_S))
                finally:
                    self._waiting -= 1
                pooled = self._pop()
            self._depth.note_take(waited=waited or pooled is None, left=len(self._ready))
            return pooled

    def refill(self) -> None:
        """Let threads make what is missing, as many as are not at it yet."""
        with self._changed:
            missing = self._depth.wanted - len(self._ready) - self._making
            starting = 0 if self._closed else max(0, min(missing, self._makers - self._making))
            self._making += starting
        try:
            while starting:
                thread = ServiceThread(self._fill, name="fcvm-pool")
                try:
                    self._threads.start(thread)
                finally:
                    starting -= thread.ident is not None
        except (RuntimeError, FcvmError):  # no more threads: the next test starts its clone itself
            pass
        finally:
            with self._changed:
                self._making -= starting
                self._changed.notify_all()

    def drain(self) -> None:
        """Give back what is there: somebody else needs the room."""
        with self._changed:
            given_back, self._ready = self._ready, deque()
        for pooled in given_back:
            _discard(pooled.running)

    def close(self) -> None:
        """Give everything back and wait for the makers; no other clone will follow."""
        with self._changed:
            self._closed = True
        self.drain()
        self._interrupt()
        self._threads.join(_CLOSE_S)

    def _pop(self) -> Pooled | None:
        while self._ready:
            pooled = self._ready.popleft()
            if pooled.running.ended is None:
                return pooled
            self.lost += 1  # it died while nobody looked: the test gets the next one
            _discard(pooled.running)
        return None

    def _is_wanted(self) -> bool:
        return self._waiting > len(self._ready)

    def _fill(self) -> None:
        more = True
        while more:
            pooled: Pooled | None = None
            try:
                pooled = self._make(self._is_wanted)
            except NoRoomToPrewarm:
                pass
            except FcvmError as error:
                if not self._closed:
                    self.fault = error
            finally:
                more = self._keep(pooled)

    def _keep(self, pooled: Pooled | None) -> bool:
        """Take in what was made, or not; return whether another one is missing."""
        with self._changed:
            kept = pooled is not None and not self._closed
            if pooled is not None and kept:
                self._ready.append(pooled)
            more = kept and len(self._ready) + self._making - 1 < self._depth.wanted
            self._making -= not more
            self._changed.notify_all()
        if pooled is not None and not kept:
            _discard(pooled.running)
        return more


def _discard(running: RunningVm) -> None:
    with suppress(FcvmError):
        running.close()
