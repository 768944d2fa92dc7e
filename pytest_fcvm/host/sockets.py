"""Sockets that work although a test has replaced `socket.socket` or its methods.

pytest-socket and mocks replace them to keep tests from the network. Our own sockets do not reach it: they are Unix
sockets, or on loopback.
"""

from __future__ import annotations

import _socket
import socket
import struct
import warnings
from contextlib import suppress
from typing import Any

from pytest_fcvm.errors import HostError
from pytest_fcvm.host import own

__all__ = ["Socket", "check_allowed", "connect", "discard_input", "listen", "reset", "socket_pair"]

_BLOCKER = "pytest_socket"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_BACKLOG = 4096  # the kernel takes its own limit where that is lower (net.core.somaxconn)


class Socket(own.Socket):
    """A socket with the original `connect` and `accept`."""

    connect = _socket.socket.connect

    def accept(self) -> tuple[Socket, Any]:
        """Wait for a connection; return its socket and the address of its other end."""
        descriptor, address = self._accept()  # type: ignore[attr-defined]
        return Socket(self.family, self.type, self.proto, fileno=descriptor), address


def check_allowed() -> None:
    """Raise HostError where pytest-socket refuses the running test even Unix sockets."""
    if socket.socket.__module__ != _BLOCKER:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pytest-socket also warns, and `-W error` turns that into an exception
            socket.socket(socket.AF_UNIX).close()
    except RuntimeError as error:
        raise HostError(
            "pytest-socket refuses this test all sockets, and clones need Unix sockets",
            hint="add --allow-unix-socket to --disable-socket, or mark the test with @pytest.mark.enable_socket",
        ) from error


def socket_pair(kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[Socket, Socket]:
    """Return two connected Unix sockets. Raise OSError."""
    one, other = _socket.socketpair(socket.AF_UNIX, kind)
    return Socket(fileno=one.detach()), Socket(fileno=other.detach())


def connect(address: tuple[str, int], *, timeout_s: float) -> Socket:
    """Return a TCP connection to an IP address and port. Raise OSError."""
    connection = Socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def listen(address: tuple[str, int]) -> Socket:
    """Return a TCP socket that listens at an IP address and port. Raise OSError."""
    listener = Socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family is socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as socket.create_server does
        listener.bind(address)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def reset(client: socket.socket) -> None:
    """Close a socket so that its peer sees a reset."""
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    client.close()


def discard_input(connection: socket.socket) -> None:
    """Read and drop what has arrived on a stream socket. Raise OSError; an end of the stream is none."""
    while True:
        try:
            if not connection.recv(65536, socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
