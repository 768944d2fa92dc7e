"""Events of a session's thread: its channel, a wake-up by other threads, and the sockets that it serves."""

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
    """Serves a socket. Both methods are called on the session's thread, must not wait, and must not raise."""

    def ready(self, events: int) -> None:
        """Handle events of the socket."""

    def session_ended(self) -> None:
        """Release everything: the session is over."""


class Poller:
    """Waits for events. Any thread may call every method but `wait`. Raises OSError if no descriptor is left."""

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
        self._rests: dict[int, int] = {}  # descriptors that are ignored for a moment, and their events
        self._over = False
        self.use_channel(channel)

    def use_channel(self, channel: socket.socket) -> None:
        """Wait for this channel from now on. Call `forget_channel` for the one before first."""
        self._channel_fd, self._channel_events = channel.fileno(), IN
        self._epoll.register(self._channel_fd, IN)

    def forget_channel(self) -> None:
        """Wait for no channel. Call it before the channel is closed."""
        self._epoll.unregister(self._channel_fd)

    def attach(self, descriptor: int, events: int, handler: Handler) -> None:
        """Serve a descriptor until `detach`. If the session is over, call `session_ended` at once."""
        with self._lock:
            over = self._over
            if not over:
                self._handlers[descriptor] = handler
                self._epoll.register(descriptor, events)
        if over:
            handler.session_ended()

    def change(self, descriptor: int, events: int) -> None:
        """Wait for other events of a descriptor. Errors are reported also for none."""
        with self._lock:
            if descriptor in self._handlers:
                self._epoll.modify(descriptor, events)

    def rest(self, descriptor: int, events: int) -> None:
        """Ignore a descriptor for 50 ms, while a resource of the host is used up."""
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
        """Wait, serve the attached descriptors, and return whether the channel is ready.

        With `writes`, also wait until the channel takes bytes. With `at_once`, do not wait.
        """
        wanted = IN | OUT if writes else IN
        if wanted != self._channel_events:
            self._epoll.modify(self._channel_fd, wanted)
            self._channel_events = wanted
        ready = dict(self._epoll.poll(0 if at_once else _RETRY_S if self._rests else None))
        if self._rests:
            self._end_rests()
        if ready.pop(self._wake_fd, 0):
            os.eventfd_read(self._wake_fd)
        channel_is_ready = bool(ready.pop(self._channel_fd, 0))
        for descriptor, events in ready.items():
            handler = self._handlers.get(descriptor)
            if handler:
                handler.ready(events)
        return channel_is_ready

    def end(self) -> None:
        """Call `session_ended` of every handler, also of those that are attached later."""
        with self._lock:
            self._over = True
            handlers = set(self._handlers.values())
        for handler in handlers:
            handler.session_ended()

    def close(self) -> None:
        """Close the descriptors; idempotent."""
        descriptor, self._wake_fd = self._wake_fd, -1
        if descriptor >= 0:
            os.close(descriptor)
        self._epoll.close()

    def _end_rests(self) -> None:
        with self._lock:
            resting, self._rests = self._rests, {}
            for descriptor, events in resting.items():
                self._epoll.modify(descriptor, events)
