"""What a session's thread waits for: its channel, a wake-up by other threads, and sockets that it serves besides."""

from __future__ import annotations

import select
import socket
import threading
from typing import Protocol

from pytest_fcvm.host.own import os

__all__ = ["ERROR", "HANG_UP", "IN", "OUT", "Handler", "Poller"]

IN, OUT, ERROR, HANG_UP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLERR, select.EPOLLHUP
_RETRY_S = 0.05


class Handler(Protocol):
    """Who serves a socket. Both are called on the session's thread, must not wait, and must not raise."""

    def ready(self, events: int) -> None:
        """Act on events of the socket."""

    def session_ended(self) -> None:
        """Give everything back: the session is over."""


class Poller:
    """Every method but `wait` may be called from any thread. Raise OSError where no descriptor is left."""

    def __init__(self, channel: socket.socket) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._epoll = select.epoll()
        except OSError:
            os.close(self._wake_fd)
            raise
        self._epoll.register(self._wake_fd, IN)
        self._lock = threading.Lock()
        self._handlers: dict[int, Handler] = {}
        self._rests: dict[int, int] = {}  # descriptors that are looked at again a little later, and for what
        self._over = False
        self.use_channel(channel)

    def use_channel(self, channel: socket.socket) -> None:
        """Wait for this channel from now on; the one before has been forgotten or closed."""
        self._channel_fd, self._channel_events = channel.fileno(), IN
        self._epoll.register(self._channel_fd, IN)

    def forget_channel(self) -> None:
        """Wait for no channel, before it is closed."""
        self._epoll.unregister(self._channel_fd)

    def attach(self, descriptor: int, events: int, handler: Handler) -> None:
        """Serve a descriptor until `detach`; where the session is over, tell that at once."""
        with self._lock:
            over = self._over
            if not over:
                self._handlers[descriptor] = handler
                self._epoll.register(descriptor, events)
        if over:
            handler.session_ended()

    def change(self, descriptor: int, events: int) -> None:
        """Wait for other events of a descriptor; for none it still tells errors."""
        with self._lock:
            if descriptor in self._handlers:
                self._epoll.modify(descriptor, events)

    def rest(self, descriptor: int, events: int) -> None:
        """Leave a descriptor alone for some hundredths of a second: what it needs lacks just now."""
        with self._lock:
            if descriptor in self._handlers:
                self._epoll.modify(descriptor, 0)
                self._rests[descriptor] = events

    def detach(self, descriptor: int) -> None:
        """Forget a descriptor, before it is closed: a forked process may hold it open."""
        with self._lock:
            self._rests.pop(descriptor, None)
            if self._handlers.pop(descriptor, None):
                self._epoll.unregister(descriptor)

    def wake(self) -> None:
        """Let `wait` return; harmless after `close`."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def wait(self, *, writes: bool, at_once: bool) -> bool:
        """Wait, serve what is attached, and return whether the channel is ready.

        `writes` says whether it is to be told when the channel takes more, `at_once` that there is no time to wait.
        """
        wanted = IN | OUT if writes else IN
        if wanted != self._channel_events:
            self._epoll.modify(self._channel_fd, wanted)
            self._channel_events = wanted
        ready = dict(self._epoll.poll(0 if at_once else _RETRY_S if self._rests else None))
        if self._rests:
            self._resume_session()
        if ready.pop(self._wake_fd, 0):
            os.eventfd_read(self._wake_fd)
        channel_is_ready = bool(ready.pop(self._channel_fd, 0))
        for descriptor, events in ready.items():
            handler = self._handlers.get(descriptor)
            if handler:
                handler.ready(events)
        return channel_is_ready

    def end(self) -> None:
        """Tell everyone who is attached, and who attaches later, that the session is over."""
        with self._lock:
            self._over = True
            handlers = set(self._handlers.values())
        for handler in handlers:
            handler.session_ended()

    def close(self) -> None:
        """Give the descriptors back; idempotent."""
        descriptor, self._wake_fd = self._wake_fd, -1
        if descriptor >= 0:
            os.close(descriptor)
        self._epoll.close()

    def _resume_session(self) -> None:
        with self._lock:
            resting, self._rests = self._rests, {}
            for descriptor, events in resting.items():
                self._epoll.modify(descriptor, events)
