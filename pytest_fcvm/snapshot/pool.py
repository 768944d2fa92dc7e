"""The pool: prewarmed clones, restored, verified and warmed, then frozen and paused. A test gets one in 3 ms.

A prewarmed clone has its identity before the workload's first instruction, as every clone has. The readiness check has
run the service's code since: under emulation a guest's first pass through any code costs ten times the second. A paused
clone takes no CPU time.
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
from pytest_fcvm.host.threads import ServiceThread, ThreadGroup

__all__ = ["Depth", "Pool", "Pooled"]

_MOST = 4  # prewarmed clones of one snapshot, where the number adapts
_IDLE_TAKES = 16
_MAKE_S = 120.0
_CLOSE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """A prewarmed VM. It is frozen and paused, or runs because a test was waiting for it."""

    running: RunningVm
    name: str
    paused: bool


class Depth:
    """How many clones a pool has: a fixed number, or one that follows the tests.

    One is enough while a test takes longer than a clone takes to start. A test that has to wait adds one; a clone that
    stays over for 16 tests is dropped. Where VMs are rewound one is always enough: more would share the same CPUs.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._adapts = fixed is None
        self.wanted = 1 if fixed is None else fixed
        self._left_over = 0

    def note_take(self, *, waited: bool, left: int, rewinds: bool = False) -> None:
        """Learn from a test that took a clone: whether it had to wait, how many were left, and if VMs are rewound."""
        if not self._adapts:
            return
        self._left_over = self._left_over + 1 if left and not waited else 0
        if rewinds:
            self.wanted = 1
        elif waited:
            self.wanted = min(self.wanted + 1, _MOST)
        elif self._left_over >= _IDLE_TAKES:
            self.wanted, self._left_over = max(1, self.wanted - 1), 0


class Pool:
    """The prewarmed clones of one snapshot. Up to `makers` threads make them, and live while there is work.

    `make` starts a clone. It gets a function that says whether a test is waiting, and then leaves out what only saves
    later time. When `make` raises FcvmError, the pool waits until the next clone is taken; a test that needs a clone
    meanwhile starts its own and sees the reason. `interrupt` ends every `make` that is under way. `rewinds` says
    whether VMs of ended clones are used again.
    """

    def __init__(
        self,
        make: Callable[[Callable[[], bool]], Pooled],
        depth: Depth,
        makers: int = 1,
        interrupt: Callable[[], object] = lambda: None,
        rewinds: Callable[[], bool] = lambda: False,
    ) -> None:
        self._make, self._depth, self._makers = make, depth, makers
        self._interrupt, self._rewinds = interrupt, rewinds
        self._threads = ThreadGroup()
        self._changed = threading.Condition()
        self.ready: deque[Pooled] = deque()
        self._closed = False
        self.making = self._waiting = 0
        self.lost = 0
        self.fault: FcvmError | None = None

    def take(self) -> Pooled | None:
        """Return a prewarmed clone, after a wait for one that is being made. None: the caller starts its own."""
        with self._changed:
            waited = False
            pooled = self._pop()
            if pooled is None and self.making:
                waited = True
                self._waiting += 1
                try:
                    wait_on(self._changed, lambda: self.ready or not self.making, Deadline(_MAKE_S))
                finally:
                    self._waiting -= 1
                pooled = self._pop()
            is_late = waited or pooled is None
            self._depth.note_take(waited=is_late, left=len(self.ready), rewinds=self._rewinds())
            return pooled

    def refill(self) -> None:
        """Start threads for the clones that are missing and that no thread makes yet."""
        with self._changed:
            missing = self._depth.wanted - len(self.ready) - self.making
            starting = 0 if self._closed else max(0, min(missing, self._makers - self.making))
            self.making += starting
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
                self.making -= starting
                self._changed.notify_all()

    def release(self) -> None:
        """End the clones that no test has taken."""
        with self._changed:
            released, self.ready = self.ready, deque()
        for pooled in released:
            _discard(pooled.running)

    def close(self) -> None:
        """End all prewarmed clones and the threads that make them; refuse any further one."""
        with self._changed:
            self._closed = True
        self.release()
        self._interrupt()
        self._threads.join(_CLOSE_S)

    def _pop(self) -> Pooled | None:
        while self.ready:
            pooled = self.ready.popleft()
            if pooled.running.ended is None:
                return pooled
            self.lost += 1  # it died while it was paused: the test gets the next one
            _discard(pooled.running)
        return None

    def _is_wanted(self) -> bool:
        return self._waiting > len(self.ready)

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
        """Add a clone to the pool unless it is closed; return whether another one is missing."""
        with self._changed:
            kept = pooled is not None and not self._closed
            if pooled is not None and kept:
                self.ready.append(pooled)
            more = kept and len(self.ready) + self.making - 1 < self._depth.wanted
            self.making -= not more
            self._changed.notify_all()
        if pooled is not None and not kept:
            _discard(pooled.running)
        return more


def _discard(running: RunningVm) -> None:
    with suppress(FcvmError):
        running.discard()
