"""The standby: while a test runs, the VMM of the next clone starts and waits for its state.

Half of the time to a clone is the start of its VMM (loading libraries, building the board). A standby VMM has no guest
memory and no identity, and runs no instruction of any workload.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from pytest_fcvm.engine.protocol import PreparedVm, RestorePlan, Vm
from pytest_fcvm.engine.vm import discard, start_or_discard
from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.threads import ServiceThread, ThreadGroup

__all__ = ["Standby"]

_CLOSE_S = 10.0


class Standby:
    """The standby VMM of one snapshot. `prepare` is the engine's; `usual` is the plan that most clones have."""

    def __init__(self, prepare: Callable[[RestorePlan], PreparedVm], usual: RestorePlan) -> None:
        self._prepare, self._usual = prepare, usual
        self._lock = threading.Lock()
        self._standby: PreparedVm | None = None
        self._filling = self._closed = False
        self._threads = ThreadGroup()

    def take(self, plan: RestorePlan) -> Vm:
        """Return a started VM for a plan: the standby where it fits and lives, else a new one."""
        if not plan.attachments:
            with self._lock:
                standby, self._standby = self._standby, None
            if standby is not None:
                standby.name = plan.name
                with suppress(FcvmError):  # it died while it waited
                    return start_or_discard(standby)
        return start_or_discard(self._prepare(plan))

    def refill(self) -> None:
        """Prepare the next standby in a thread, unless there is one."""
        with self._lock:
            if self._closed or self._filling or self._standby is not None:
                return
            self._filling = True
        thread = ServiceThread(self._fill, name="fcvm-standby")
        try:
            with suppress(RuntimeError, FcvmError):  # no more threads: the next clone does without
                self._threads.start(thread)
        finally:
            if thread.ident is None:
                with self._lock:
                    self._filling = False

    def close(self) -> None:
        """End the standby and the thread that prepares one; refuse any further one."""
        with self._lock:
            self._closed = True
            standby, self._standby = self._standby, None
        if standby is not None:
            discard(standby)
        self._threads.join(_CLOSE_S)

    def _fill(self) -> None:
        with suppress(FcvmError), translating_emfile("a standby"):  # the next clone reports the reason
            standby: PreparedVm | None = None
            try:
                standby = self._prepare(self._usual)
            finally:
                with self._lock:
                    self._filling, closed = False, self._closed
                    self._standby = None if closed else standby
                if closed and standby is not None:
                    discard(standby)
            if not closed:
                standby.preconfigure()  # a clone that has taken the standby already waits for this
