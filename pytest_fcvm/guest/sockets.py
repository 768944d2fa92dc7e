"""Sockets connected to ports of the guest, made by the agent inside it."""

from __future__ import annotations

import errno
import struct
from typing import Self

from pytest_fcvm.guest.streams import Stream
from pytest_fcvm.host.clock import Deadline

__all__ = ["GuestDatagrams", "GuestSocket"]

_LENGTH = struct.Struct("<H")  # before every datagram


class GuestSocket:
    """A connected stream socket. A wait ends with the VM, or by GuestTimeout after `timeout_s`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def recv(self, size: int = -1, *, timeout_s: float | None = None) -> bytes:
        """Return up to `size` bytes (-1: all that have come) as soon as there are any, b"" after the peer's end.

        Raise ConnectionResetError when the guest's side was reset.
        """
        return self._stream.read(0, size, Deadline(timeout_s))

    def sendall(self, data: bytes | bytearray | memoryview, *, timeout_s: float | None = None) -> None:
        """Send all of `data`. Raise BrokenPipeError or ConnectionResetError when the guest no longer takes it."""
        self._stream.write(data, Deadline(timeout_s))

    def shutdown_write(self) -> None:
        """Send end of file. The other direction stays open."""
        self._stream.write_eof()

    def reset(self) -> None:
        """End the connection so that the guest sees a reset."""
        self._stream.abandon(errno.ECONNRESET)

    def close(self) -> None:
        """End the connection; idempotent."""
        self._stream.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GuestDatagrams:
    """A connected datagram socket. One thread may call `send` while another calls `recv`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._received = bytearray()

    def recv(self, timeout_s: float | None = None) -> bytes | None:
        """Return the next datagram, None after the last. Raise GuestTimeout at the deadline, losing nothing."""
        deadline = Deadline(timeout_s)
        size = _LENGTH.size
        if not self._fetch(size, deadline):
            return None
        size += _LENGTH.unpack_from(self._received)[0]
        if not self._fetch(size, deadline):
            return None
        data = bytes(self._received[_LENGTH.size : size])
        del self._received[:size]
        return data

    def send(self, data: bytes) -> None:
        """Send one datagram, of at most 65,507 bytes; the guest's network may lose it."""
        self._stream.write(_LENGTH.pack(len(data)) + data, Deadline(None))

    def close(self) -> None:
        """End the stream and every wait for it; idempotent."""
        self._stream.abandon()

    def _fetch(self, size: int, deadline: Deadline) -> bool:
        """Read until `size` bytes are there. False: the stream ends before."""
        while len(self._received) < size:
            data = self._stream.read(0, -1, deadline)
            if not data:
                return False
            self._received += data
        return True
