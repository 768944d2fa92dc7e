"""One VMM ahead: while a test runs, the process of the next clone starts up and waits for its state.

Half of the time to a clone is the VMM's own start (loading libraries, building the machine), in which nothing of the
guest exists yet. A spare has no guest memory, no identity, and runs no instruction of any workload.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from pytest_fcvm.engine.protocol import RestorePlan, Vm
from pytest_fcvm.engine.vm import discard, started
from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.limits import translating_emfile
from pytest_fcvm.host.threads import Crew, ServiceThread

__all__ = ["Standby"]

_CLOSE_S = 10.0


class Standby:
    """The VMM ahead of one snapshot. `prepare` is the engine's; `usual` is the plan that most clones have."""

    def __init__(self, prepare: Callable[[RestorePlan], Vm], usual: RestorePlan) -> None:
        self._prepare, self._usual = prepare, usual
        self._lock = threading.Lock()
        self._standby: Vm | None = None
        self._filling = self._closed = False
        self._threads = Crew()

    def take(self, plan: RestorePlan) -> Vm:
        """Return a started VM for a plan: the spare where it fits and lives, else a new one."""
        if not plan.attachments:
            with self._lock:
                standby, self._standby = self._standby, None
            if standby is not None:
                standby.name = plan.name
                with suppress(FcvmError):  # it died while it waited
                    return started(standby)
        return started(self._prepare(plan))

    def refill(self) -> None:
        """Let a thread of its own prepare the next spare, unless there is one."""
        with self._lock:
            if self._closed or self._filling or self._standby is not None:
                return
            self._filling = True
        thread = ServiceThread(self._fill, name="fcvm-spare")
        try:
            with suppress(RuntimeError, FcvmError):  # no more threads: the next clone does without
                self._threads.start(thread)
        finally:
            if thread.ident is None:
                with self._lock:
                    self._filling = False

    def close(self) -> None:
        """End the spare and wait for the thread that prepares one; no other will follow."""
        with self._lock:
            self._closed = True
            standby, self._standby = self._standby, None
        if standby is not None:
            discard(standby)
        self._threads.join(_CLOSE_S)

    def _fill(self) -> None:
        with suppress(FcvmError), translating_emfile("a spare"):  # the clone that needs one will say why
            standby: Vm | None = None
            try:
                standby = self._prepare(self._usual)
            finally:
                with self._lock:
                    self._filling, closed = False, self._closed
                    self._standby = None if closed else standby
                if closed and standby is not None:
                    discard(standby)
            if not closed:
                standby.get_ready()  # whoever has taken it already waits for this, and is told
