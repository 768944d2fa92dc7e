"""Find out whether a program may listen at an address of the host: try it."""

from __future__ import annotations

import errno
import socket

from pytest_fcvm.host.sockets import Socket

__all__ = ["why_not_listening"]


def why_not_listening(address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    """Return why a program cannot listen at an IPv4 address, "" when it can."""
    with Socket(socket.AF_INET, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            if kind is socket.SOCK_STREAM:
                probe.listen()
        except OSError as error:
            return "the port is taken" if error.errno == errno.EADDRINUSE else str(error.strerror)
    return ""
