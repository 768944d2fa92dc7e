"""Connections between a client on the host and a guest: bytes both ways, half-closes kept, a break of one end told."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pytest_fcvm.errors import FcvmError
from pytest_fcvm.host.own import os

__all__ = ["ByteStream", "Links", "MakeThread", "SocketStream", "reset"]

MakeThread = Callable[..., threading.Thread]

_THREAD = "fcvm-relay"
_CHUNK = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class ByteStream(Protocol):
    """A connection into the guest. `recv` returns b"" at the peer's half-close; a reset is a ConnectionError."""

    def recv(self, size: int) -> bytes:
        """Return the next bytes."""
        ...

    def sendall(self, data: bytes) -> None:
        """Send all bytes, waiting as long as the guest does not read."""
        ...

    def shutdown_write(self) -> None:
        """Half-close: say that no more bytes will come."""
        ...

    def reset(self) -> None:
        """End the connection so that the guest sees a reset; wake whoever waits in another method. Idempotent."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class SocketStream:
    """A connected socket as such a connection; each direction is used by one thread.

    It takes the socket over, also when it fails for want of a descriptor, by OSError.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._broken = threading.Event()
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)  # a shutdown would wake as well, but send a FIN
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
            with suppress(BlockingIOError):  # room for a byte is not room for all
                view = view[self._socket.send(view, socket.MSG_DONTWAIT) :]

    def shutdown_write(self) -> None:
        """Half-close: say that no more bytes will come."""
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Wake whoever waits in another method; `close` sends the reset then. Idempotent."""
        if not self._broken.is_set():
            self._broken.set()
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the connection, when nobody calls another method any more."""
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
    """The connections of one machine. `make_thread` makes threads."""

    def __init__(self, make_thread: MakeThread) -> None:
        self._make_thread = make_thread
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._over = False

    def join(self, client: socket.socket, guest: ByteStream) -> None:
        """Copy both ways until both have ended, on this thread and one more; closes both ends."""
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
        """Reset all connections, also those that are joined later; idempotent."""
        with self._lock:
            self._over = True
            for link in self._links:
                link.reset()


class _Link:
    """A client's connection and the guest's end of it. Each half ends by itself; a break of one end resets both."""

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
        """Give both ends back, after `copy`, when nobody calls `reset` any more."""
        self._client.close()
        self._guest.close()

    def reset(self) -> None:
        """End both ends by a reset and wake both directions."""
        self._broken.set()
        self._client.reset()
        self._guest.reset()

    def _pump(self, source: ByteStream, target: ByteStream) -> None:
        try:
            while data := source.recv(_CHUNK):
                target.sendall(data)
            if self._broken.is_set():  # what ended was no half-close
                raise ConnectionAbortedError
            target.shutdown_write()
        except (OSError, FcvmError):
            self.reset()


def reset(client: socket.socket) -> None:
    """Close a socket so that its peer sees a reset."""
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    client.close()
