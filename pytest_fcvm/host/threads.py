"""Threads beside a user's tests: daemons that take no signal.

A signal for the process goes to any thread that does not block it. Python acts on it in the main thread alone, which is
not woken from a system call when another thread took it: Ctrl-C was lost in a `time.sleep` of a test, once in 25.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from pytest_fcvm.host.clock import Deadline

__all__ = ["Crew", "ServiceThread", "block_signals"]

_ALL = signal.valid_signals()


def block_signals() -> None:
    """Block all signals in the calling thread, which a library has started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)


class ServiceThread(threading.Thread):
    """A daemon thread with all signals blocked."""

    def __init__(self, target: Callable[..., object], *arguments: Any, name: str) -> None:
        super().__init__(target=target, args=arguments, name=name, daemon=True)

    def start(self) -> None:
        """Start it. Raise RuntimeError when there can be no more threads."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)  # it begins with its maker's mask
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, at most so many seconds. One that could not be started has none."""
        if self.ident is not None:
            super().join(timeout)


class Crew:
    """Service threads that one owner has started, for it to wait for at its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[ServiceThread] = []

    def start(self, thread: ServiceThread) -> None:
        """Start one more. Raise RuntimeError when there can be no more threads; it is to be waited for if it runs."""
        with self._lock:
            try:
                thread.start()
            finally:
                running = [other for other in self._threads if other.is_alive()]
                self._threads = [*running, thread] if thread.ident is not None else running

    def join(self, timeout_s: float) -> None:
        """Wait until all have ended, at most so long; never for the caller itself."""
        deadline = Deadline(timeout_s)
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(deadline.remaining())
