"""Threads beside a user's tests: daemons that take no signal.

A signal for the process goes to any thread that does not block it. Python acts on it in the main thread alone, which is
not woken from a system call when another thread took it: Ctrl-C was lost in a `time.sleep` of a test, once in 25.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["ServiceThread"]

_ALL = signal.valid_signals()


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
