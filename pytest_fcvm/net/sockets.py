"""Sockets to a guest that has a network card, as the relay takes connections into a guest."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from contextlib import suppress

from pytest_fcvm.errors import GuestTimeout

__all__ = ["CardDatagrams", "CardStream"]

_LARGEST = 65535
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class CardStream:
    """A TCP connection through the guest's card. Each direction is used by one thread; any may reset it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._reset = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)

    def recv(self, size: int) -> bytes:
        """Return the next bytes, b"" at the peer's half-close. Raise ConnectionError for a reset."""
        self._wait(select.POLLIN)
        return self._socket.recv(size)

    def sendall(self, data: bytes) -> None:
        """Send all bytes, waiting as long as the guest does not read."""
        view = memoryview(data)
        while view:
            self._wait(select.POLLOUT)
            with suppress(BlockingIOError):
                view = view[self._socket.send(view, socket.MSG_DONTWAIT) :]

    def shutdown_write(self) -> None:
        """Half-close: say that no more bytes will come."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection so that the guest sees a reset; wake whoever waits in another method. Idempotent."""
        if not self._reset.is_set():
            self._reset.set()
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the connection, when nobody waits in another method."""
        if self._reset.is_set():
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._socket.close()
        os.close(self._wake)

    def _wait(self, event: int) -> None:
        poll = select.poll()
        poll.register(self._socket, event)
        poll.register(self._wake, select.POLLIN)
        if any(descriptor == self._wake for descriptor, _ in poll.poll()):
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


class CardDatagrams:
    """Datagrams to one UDP port of the guest through its card, as from one peer."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def recv(self, timeout_s: float) -> bytes | None:
        """Return the next datagram, None after `close`. Raise GuestTimeout when none came, OSError for a refusal."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            raise GuestTimeout("no datagram came")
        return self._socket.recv(_LARGEST) or None  # an empty one is not told from the end

    def send(self, data: bytes) -> None:
        """Send one datagram."""
        self._socket.send(data)

    def close(self) -> None:
        """End it and wake whoever waits."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
