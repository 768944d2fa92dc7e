"""One process of the supervisor, as its users see it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pytest_fcvm.errors import HostError
from pytest_fcvm.host.own import check_owner, getpid, os

__all__ = ["Child", "ChildExit"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ChildExit:
    """How a process ended: `code` or `signal`, never both."""

    code: int | None = None
    signal: int | None = None


class Child:
    """A running process. Any thread may call any method.

    `pid` is the id that `ps` shows. `pidfd` can be polled for the end. It is closed, and -1, once the end is reported.
    """

    def __init__(self, name: str, *, end: Callable[[], None]) -> None:
        self.name = name
        self.pid = 0
        self.pidfd = -1
        self._end = end
        self._owner = getpid()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._exit: ChildExit | None = None
        self._callbacks: list[Callable[[ChildExit], None]] = []

    @property
    def exited(self) -> ChildExit | None:
        """Return how the process ended, None while it runs."""
        return self._exit

    def kill(self) -> None:
        """Send SIGKILL, have the process's own directory removed, and return at once. Idempotent.

        A process that ended by itself keeps its directory until then, so that its output can be read. Do nothing in a
        forked child.
        """
        if getpid() == self._owner:
            self.send_signal(signal.SIGKILL)
            self._end()

    def send_signal(self, number: int) -> None:
        """Send a signal to this process, never to another one with its id. Do nothing when it has ended."""
        with self._lock, suppress(ProcessLookupError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)

    def wait(self, timeout_s: float) -> ChildExit:
        """Wait until the process has ended. Raise HostError at the deadline, UsageProblem in a forked process."""
        check_owner(self._owner)
        if not self._over.wait(min(timeout_s, threading.TIMEOUT_MAX)) or self._exit is None:
            raise HostError(f"{self.name} (pid {self.pid}) did not end within {timeout_s:g} s")
        return self._exit

    def on_exit(self, callback: Callable[[ChildExit], None]) -> None:
        """Call back once when the process has ended: from the service thread, or at once if it already has.

        The callback must return quickly.
        """
        with self._lock:
            if self._exit is None:
                self._callbacks.append(callback)
                return
            known = self._exit
        callback(known)

    def forget_callbacks(self) -> None:
        """Drop the callbacks of `on_exit` that were not called yet."""
        with self._lock:
            self._callbacks.clear()

    def attach(self, pid: int, pidfd: int) -> None:
        """Store the process's id and pidfd. For the supervisor."""
        with self._lock:
            if self._exit is None:
                self.pid, self.pidfd = pid, pidfd
            else:  # the end was reported before the spawn's answer
                self.pid = pid
                os.close(pidfd)

    def finish(self, how: ChildExit) -> None:
        """Store how the process ended, and call back. For the supervisor."""
        with self._lock:
            if self._exit is not None:
                return
            self._exit = how
            callbacks, self._callbacks = self._callbacks, []
            if self.pidfd >= 0:
                os.close(self.pidfd)
                self.pidfd = -1
        self._over.set()
        for callback in callbacks:
            try:
                callback(how)
            except Exception:  # noqa: BLE001 - the other callbacks must be called
                _log.exception("a callback for the end of %s failed", self.name)
