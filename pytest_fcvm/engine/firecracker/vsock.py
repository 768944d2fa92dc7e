"""The channel to the agent: a connection through Firecracker's vsock socket (its docs/vsock.md)."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pytest_fcvm.errors import GuestTimeout
from pytest_fcvm.host.clock import Deadline, wait_until
from pytest_fcvm.host.sockets import Socket

__all__ = ["connect"]

_ANSWER_S = 5.0  # a running guest answers at once, a guest without CPU time late
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.02


def connect(path: Path, port: int, deadline: Deadline, check_alive: Callable[[], None]) -> socket.socket:
    """Connect to a port of the guest. Try again until something listens there.

    The guest must run: a clone's resume resets a connection that was made before. Firecracker closes a connection to a
    port without a listener, and there is no event to wait for. A connection is accepted by the guest's kernel; the
    session's hello shows whether the agent reads it. Raise what `check_alive` raises for a dead VM, GuestTimeout at the
    deadline.
    """

    def try_once() -> socket.socket | None:
        check_alive()
        return _connect_once(path, port)

    connection = wait_until(try_once, deadline, interval_s=_FIRST_PAUSE_S, longest_interval_s=_LONGEST_PAUSE_S)
    if connection is None:
        raise GuestTimeout(
            f"the guest did not open its channel within {deadline}", hint="see in the console how far the boot came"
        )
    return connection


def _connect_once(path: Path, port: int) -> socket.socket | None:
    connection = Socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ANSWER_S)
        connection.connect(str(path))
        connection.sendall(b"CONNECT %d\n" % port)
        if _read_line(connection).startswith(b"OK "):
            connection.settimeout(None)
            return connection
    except OSError:
        pass
    except BaseException:
        connection.close()
        raise
    with suppress(OSError):
        connection.close()
    return None


def _read_line(connection: socket.socket) -> bytes:
    """Read one line, and nothing after it. Return what there is when the other end closes."""
    line = b""
    while not line.endswith(b"\n"):
        seen = connection.recv(64, socket.MSG_PEEK)
        if not seen:
            break
        end = seen.find(b"\n") + 1
        line += connection.recv(end or len(seen))
    return line
