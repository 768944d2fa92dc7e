"""A TCP connection to a port of the guest, made by the agent inside it."""

from __future__ import annotations

import errno
from typing import Self

from pytest_fcvm.guest.streams import Stream
from pytest_fcvm.host.clock import Deadline

__all__ = ["GuestSocket"]


class GuestSocket:
    """A connected stream socket. Waits end with the VM; `timeout_s` ends them sooner, by GuestTimeout."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def recv(self, size: int = -1, *, timeout_s: float | None = None) -> bytes:
        """Return up to `size` bytes (-1: all that came) as soon as there are any, b"" after the peer's end.

        Raise ConnectionResetError when the guest's side was reset.
        """
        return self._stream.read(0, size, Deadline(timeout_s))

    def sendall(self, data: bytes | bytearray | memoryview, *, timeout_s: float | None = None) -> None:
        """Send all of `data`. Raise BrokenPipeError or ConnectionResetError when the guest no longer takes it."""
        self._stream.write(data, Deadline(timeout_s))

    def shutdown_write(self) -> None:
        """Say that nothing more comes; the other direction stays open."""
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
