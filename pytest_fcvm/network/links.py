"""Links between a client on the host and a guest: bytes both ways, half-closes kept, a reset of one end passed on."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.own import os
from pytest_fcvm.host.sockets import reset

__all__ = ["ByteStream", "Links", "MakeThread", "SocketStream"]

MakeThread = Callable[..., threading.Thread]

_THREAD = "fcvm-relay"
_CHUNK = 64 * 1024


class ByteStream(Protocol):
    """A connection into the guest."""

    def recv(self, size: int) -> bytes:
        """Return the next bytes, b"" at the peer's half-close. Raise ConnectionError for a reset."""
        ...

    def sendall(self, data: bytes) -> None:
        """Send all bytes, waiting as long as the guest does not read."""
        ...

    def shutdown_write(self) -> None:
        """Half-close: no more bytes will come."""
        ...

    def reset(self) -> None:
        """End the connection so that the guest sees a reset, and wake the calls that wait. Idempotent."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class SocketStream:
    """A connected socket as a ByteStream. Use each direction in one thread.

    It owns the socket, even when it raises OSError because no descriptor is left.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._broken = threading.Event()
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)  # a shutdown wakes too, but sends a FIN
        except OSError:
            reset(connection)
            raise

    def recv(self, size: int) -> bytes:
        """Return the next bytes, b"" at the peer's half-close. Raise ConnectionError for a reset."""
        self._wait(select.POLLIN)
        return self._socket.recv(size)

    def sendall(self, data: bytes) -> None:
        """Send all bytes, waiting as long as the peer does not read."""
        view = memoryview(data)
        while view:
            self._wait(select.POLLOUT)
            with suppress(BlockingIOError):  # the buffer has room, but not for all
                view = view[self._socket.send(view, socket.MSG_DONTWAIT) :]

    def shutdown_write(self) -> None:
        """Half-close: no more bytes will come."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Wake the calls that wait; `close` then sends the reset. Idempotent."""
        if not self._broken.is_set():
            self._broken.set()
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the connection. Call no other method afterwards."""
        if self._broken.is_set():
            reset(self._socket)
        self._socket.close()
        os.close(self._wake)

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        poll.register(self._wake, select.POLLIN)
        if any(descriptor == self._wake for descriptor, _ in poll.poll()):
            raise ConnectionAbortedError


class Links:
    """The links of one VM. `make_thread` makes threads."""

    def __init__(self, make_thread: MakeThread) -> None:
        self._make_thread = make_thread
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._over = False

    def join(self, client: socket.socket, guest: ByteStream) -> None:
        """Copy both ways until both have ended, in this thread and one more, then close both ends."""
        try:
            link = _Link(client, guest, self._make_thread)
        except OSError:  # no descriptor is left
            guest.reset()
            guest.close()
            return
        try:
            with self._lock:
                self._links.add(link)
                if self._over:
                    link.reset()
            link.copy()
        except (RuntimeError, FcvmError):  # no thread is left for the other way
            link.reset()
        finally:
            with self._lock:
                self._links.discard(link)
            link.close()

    def close(self) -> None:
        """Reset all links, also those that are joined later. Idempotent."""
        with self._lock:
            self._over = True
            for link in self._links:
                link.reset()


class _Link:
    """A client's connection and the guest's. Each direction ends by itself; a reset of one connection resets both."""

    def __init__(self, client: socket.socket, guest: ByteStream, make_thread: MakeThread) -> None:
        self._client, self._guest, self._make_thread = SocketStream(client), guest, make_thread
        self._broken = threading.Event()

    def copy(self) -> None:
        """Copy both ways until both have ended."""
        upward = self._make_thread(self._pump, self._client, self._guest, name=_THREAD)
        upward.start()
        self._pump(self._guest, self._client)
        upward.join()

    def close(self) -> None:
        """Close both connections, after `copy`. Call `reset` no more."""
        self._client.close()
        self._guest.close()

    def reset(self) -> None:
        """Reset both connections and wake both directions."""
        self._broken.set()
        self._client.reset()
        self._guest.reset()

    def _pump(self, source: ByteStream, target: ByteStream) -> None:
        try:
            while data := source.recv(_CHUNK):
                target.sendall(data)
            if self._broken.is_set():  # the end was no half-close
                raise ConnectionAbortedError
            target.shutdown_write()
        except (OSError, FcvmError):
            self.reset()
