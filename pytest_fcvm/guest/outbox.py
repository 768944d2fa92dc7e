"""Bytes on their way to the agent. A write never blocks: bytes that the channel does not take now wait here.

The credit of the streams and the number of pending calls limit how much waits.
"""

from __future__ import annotations

import socket
from collections import deque
from itertools import islice

__all__ = ["Outbox"]

# One sendmsg takes up to IOV_MAX (1024) pieces; more than these do not make it faster.
_PIECES = 64


class Outbox:
    """Frames in the order in which they were put. Call every method with the session's lock held."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._queue: deque[bytes | memoryview] = deque()
        self._held: deque[bytes | memoryview] | None = None
        self.blocked = False  # the channel is full: flush again when it is writable
        self.fault: OSError | None = None

    def put(self, frame: bytes) -> None:
        """Add a frame, or the bytes of several."""
        (self._queue if self._held is None else self._held).append(frame)

    def hold(self) -> None:
        """Hold back frames that are put from now on."""
        self._held = deque()

    def release(self, first: bytes = b"") -> None:
        """Queue `first` and then the frames that were held back."""
        self._queue.extend((first, *(self._held or ())) if first else self._held or ())
        self._held = None

    def move_to(self, sock: socket.socket, first: bytes, *, holds: bool = False) -> None:
        """Go on over another channel with `first`, then the frames that were held back unless `holds`."""
        self._sock, self.fault = sock, None
        self._queue.append(first)
        if not holds:
            self.release()

    def flush(self) -> None:
        """Send what the channel takes. An error goes to `fault`: the reading side knows the cause better."""
        queue = self._queue
        while queue and self.fault is None:
            try:
                sent = self._sock.sendmsg(list(islice(queue, _PIECES)))
            except BlockingIOError:
                self.blocked = True
                return
            except OSError as error:
                self.fault = error
                break
            self._drop(sent)
        self.blocked = False

    def clear(self) -> None:
        """Forget everything that was not sent."""
        self._queue.clear()
        self._held = None
        self.blocked = False

    def _drop(self, sent: int) -> None:
        queue = self._queue
        while queue and sent >= len(queue[0]):
            sent -= len(queue.popleft())
        if sent:
            queue[0] = memoryview(queue[0])[sent:]
