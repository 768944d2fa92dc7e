"""Threads beside a user's tests: daemons that block all signals.

The kernel delivers a process's signal to any thread that does not block it. Python handles it in the main thread only,
and does not interrupt a system call there when another thread got the signal. With unblocked signals, one Ctrl-C in 25
was lost in a test's `time.sleep`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable
from typing import Any

from pytest_fcvm.host.clock import Deadline

__all__ = ["ServiceThread", "ThreadGroup", "block_signals"]

_ALL = {int(number) for number in signal.valid_signals()}
# Those of `signal` make an enum of each of the 64 numbers that they return, which costs more than the thread.
_set_mask = _signal.pthread_sigmask


def block_signals() -> None:
    """Block all signals in the calling thread. For a thread that a library has started."""
    _set_mask(signal.SIG_BLOCK, _ALL)


class ServiceThread(threading.Thread):
    """A daemon thread with all signals blocked."""

    def __init__(self, target: Callable[..., object], *arguments: Any, name: str) -> None:
        super().__init__(target=target, args=arguments, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. Raise RuntimeError when the kernel gives no more threads."""
        before = _set_mask(signal.SIG_BLOCK, _ALL)  # a new thread inherits this mask
        try:
            super().start()
        finally:
            _set_mask(signal.SIG_SETMASK, before)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread's end, at most `timeout` seconds. Return at once for a thread that was not started."""
        if self.ident is not None:
            super().join(timeout)


class ThreadGroup:
    """Service threads of one owner, which waits for them at its end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: list[ServiceThread] = []

    def start(self, thread: ServiceThread) -> None:
        """Start a thread and keep it if it runs. Raise RuntimeError when the kernel gives no more threads."""
        with self._lock:
            try:
                thread.start()
            finally:
                running = [other for other in self._threads if other.is_alive()]
                self._threads = [*running, thread] if thread.ident is not None else running

    def join(self, timeout_s: float) -> None:
        """Wait until all threads have ended, at most `timeout_s`. Do not wait for the calling thread."""
        deadline = Deadline(timeout_s)
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(deadline.remaining())
