"""One stream of a session: its reply, its bytes in both directions under credit, its end.

The session's lock guards all state. The reading thread calls the methods named `take_`. Any other thread may call the
rest, and waits there until a deadline or the end of the session.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections import deque
from collections.abc import Callable

from pytest_fcvm.errors import GuestError, GuestTimeout
from pytest_fcvm.guest.frames import (
    PROTOCOL_STREAMS_MAX,
    PROTOCOL_WINDOW,
    Fields,
    FieldTag,
    FrameType,
    ProtocolError,
    StreamKind,
    decode_fields,
    encode_frame,
)
from pytest_fcvm.guest.link import CallFailed, Inbound, Link
from pytest_fcvm.host.clock import Deadline, wait_on
from pytest_fcvm.host.own import os

__all__ = ["CallFailed", "Link", "Sink", "Stream"]

Sink = Callable[[bytes], None]

_CHANNELS = 2
_ERRNO = struct.Struct("<I")
_GRANT = struct.Struct("<BI")
# Half a window: a full one would leave frames of one byte (the channel takes a byte of the payload).
_PIECE = PROTOCOL_WINDOW // 2


class Stream:
    """The host's end of a stream. `what` names it in messages ("exec nginx")."""

    def __init__(self, link: Link, stream_id: int, kind: StreamKind, what: str, sink: Sink | None = None) -> None:
        self.id = stream_id
        self.kind = kind
        self.what = what
        self._link = link
        self._sink = sink
        self._changed = threading.Condition(link.lock)
        self._inbound = tuple(Inbound() for _ in range(0 if kind.is_verb else _CHANNELS))
        self._credit = PROTOCOL_WINDOW
        self._reply: bytes | None = None
        self._exit: Fields | None = None
        self._sent_eof = False
        self._closed: int | None = None  # the errno of the agent's CLOSE
        self._abandoned = False
        self._sink_fault: Exception | None = None
        self._watcher: Callable[[], object] | None = None

    # What callers do

    def wait_reply(self, deadline: Deadline) -> Fields:
        """Return the fields of the reply. Raise CallFailed, GuestTimeout, or why the session ended."""
        try:
            with self._link.lock:
                self._wait(lambda: self._reply is not None, deadline, "answer")
                reply = self._reply or b""
        except GuestTimeout:
            self.abandon()
            raise
        (code,) = _ERRNO.unpack_from(reply)
        fields = decode_fields(memoryview(reply)[_ERRNO.size :])
        if code:
            raise self._failure(code, fields.line(FieldTag.MESSAGE))
        return fields

    def wait_exit(self, deadline: Deadline) -> Fields:
        """Return the fields of EXIT. Raise GuestTimeout, GuestError, or why the session ended."""
        with self._link.lock:
            self._wait(lambda: self._exit is not None or self._closed is not None, deadline, "end")
            if self._exit is None:
                raise GuestError(f"the agent closed {self.what}: {os.strerror(self._closed or errno.ECONNRESET)}")
            return self._exit

    def wait_end(self, deadline: Deadline, channel: int = 0) -> None:
        """Wait until the agent has sent all of a channel. Raise what the sink raised."""
        with self._link.lock:
            self._wait(lambda: self._is_at_end(channel), deadline, "end")
            if self._sink_fault:
                raise GuestError(f"the receiver of {self.what} failed: {self._sink_fault}") from self._sink_fault

    def poll_exit(self) -> Fields | None:
        """Return the fields of EXIT, None before it has come."""
        return self._exit

    def read(self, channel: int, limit: int, deadline: Deadline) -> bytes:
        """Return up to `limit` bytes (-1: all that wait) as soon as there are any, b"" at the end.

        Raise OSError for a stream that was reset, GuestTimeout, or why the session ended.
        """
        inbound = self._inbound[channel]
        with self._link.lock:
            self._wait(lambda: bool(inbound.chunks) or self._is_at_end(channel), deadline, "bring data")
            if not inbound.chunks:
                if self._closed:
                    raise OSError(self._closed, f"{os.strerror(self._closed)}: {self.what}")
                return b""
            data = _take(inbound.chunks, limit)
            if not inbound.collecting:
                self._grant(channel, len(data))
            return data

    def write(self, data: bytes | bytearray | memoryview, deadline: Deadline) -> None:
        """Send all of `data`, waiting for credit. Raise BrokenPipeError or the errno of a stream that has ended."""
        view = memoryview(data).cast("B")
        with self._link.lock:
            while view:
                self._wait(lambda: self._credit > 0 or self._is_write_over(), deadline, "take data")
                if self._is_write_over():
                    code = self._closed or errno.EPIPE
                    raise OSError(code, f"{os.strerror(code)}: {self.what}")
                piece = view[: min(len(view), self._credit, _PIECE)]
                self._credit -= len(piece)
                self._link.transmit(encode_frame(FrameType.DATA, self.id, b"\0" + piece))
                view = view[len(piece) :]

    def write_eof(self) -> None:
        """Send end of file; idempotent, and harmless on a stream that has ended."""
        with self._link.lock:
            if not self._is_write_over():
                self._sent_eof = True
                self._link.transmit(encode_frame(FrameType.EOF, self.id, b"\0"))
                self._retire_if_over()

    def signal(self, number: int) -> None:
        """Send a signal to the process group of an exec; harmless when it has ended."""
        self._send_if_open(FrameType.SIGNAL, bytes((number,)))

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal of an exec another size; harmless when it has ended."""
        self._send_if_open(FrameType.RESIZE, struct.pack("<HH", rows, columns))

    def _send_if_open(self, kind: FrameType, payload: bytes) -> None:
        with self._link.lock:
            if self._exit is None and not self._abandoned and self._closed is None:
                self._link.transmit(encode_frame(kind, self.id, payload))

    def collect(self, channel: int) -> None:
        """Keep all input from now on, so that the agent never waits for a reader."""
        with self._link.lock:
            inbound = self._inbound[channel]
            inbound.bounded = False
            if not inbound.collecting:
                inbound.collecting = True
                self._grant(channel, sum(map(len, inbound.chunks)))

    def keep_last(self) -> None:
        """Keep the last window of each channel, so that the agent never waits for a reader."""
        for channel, inbound in enumerate(self._inbound):
            self.collect(channel)
            inbound.bounded = True

    @property
    def lost_bytes(self) -> int:
        """Return how many bytes were dropped because they were not read."""
        return sum(inbound.lost for inbound in self._inbound)

    def discard(self, channel: int) -> None:
        """Discard all input of a channel, also what has come already."""
        self.collect(channel)
        with self._link.lock:
            self._inbound[channel].discarding = True
            self._inbound[channel].chunks.clear()

    def is_stalled(self) -> bool:
        """Return whether the agent has no credit left because the input is not read."""
        return any(inbound.credit == 0 for inbound in self._inbound)

    def read_waiting(self, channel: int) -> bytes:
        """Return what a collected channel holds now, without waiting."""
        with self._link.lock:
            return _take(self._inbound[channel].chunks, -1)

    # What a watcher calls, on the session's thread, which must not wait

    def watch(self, watcher: Callable[[], object]) -> None:
        """Have a function called on the session's thread after any input of this stream. It must not raise."""
        self._watcher = watcher

    def room(self) -> int:
        """Return how many bytes `write` takes without waiting."""
        return min(self._credit, _PIECE)

    def poll_reply(self) -> tuple[int, str] | None:
        """Return the errno and the message of the reply, None before it has come."""
        reply = self._reply
        if reply is None:
            return None
        return _ERRNO.unpack_from(reply)[0], decode_fields(memoryview(reply)[_ERRNO.size :]).line(FieldTag.MESSAGE)

    def read_now(self, channel: int) -> memoryview | None:
        """Return some bytes, an empty view at the end, None if there are none yet. Raise OSError after a reset."""
        inbound = self._inbound[channel]
        with self._link.lock:
            if not inbound.chunks:
                if self._closed:
                    raise OSError(self._closed, f"{os.strerror(self._closed)}: {self.what}")
                return memoryview(b"") if self._is_at_end(channel) else None
            data = inbound.chunks.popleft()
            self._grant(channel, len(data))
            return data

    def abandon(self, code: int = 0) -> None:
        """End the stream from this side and every wait for it; idempotent."""
        with self._link.lock:
            if self._abandoned:
                return
            over = self._link.reason is not None or self._is_over()
            self._abandoned = True
            if not over:
                if not self.kind.is_verb:
                    self._link.transmit(encode_frame(FrameType.CLOSE, self.id, _ERRNO.pack(code)))
                self._link.retire(self.id)
            self._changed.notify_all()

    # What the reading thread does

    def wake(self) -> None:
        """Wake every waiter, to check its condition again. The lock is held."""
        self._notify()

    def take_reply(self, payload: bytes) -> bool:
        """Accept REPLY and return whether the call succeeded. The lock is held."""
        if self._reply is not None or len(payload) < _ERRNO.size:
            raise ProtocolError("a second or short REPLY")
        self._reply = payload
        failed = payload[: _ERRNO.size] != _ERRNO.pack(0)
        if failed and not self.kind.is_verb:
            self._closed = _ERRNO.unpack_from(payload)[0]
        self._retire_if_over()
        self._notify()
        return not failed

    def take_data(self, payload: bytes) -> None:
        """Accept DATA: keep it for a reader or hand it to the sink. The lock is not held."""
        with self._link.lock:
            inbound, size = self._channel(payload), len(payload) - 1
            inbound.credit -= size
            if inbound.credit < 0 or inbound.ended:
                raise ProtocolError("DATA beyond credit" if inbound.credit < 0 else "DATA after EOF")
            if self._sink is None:
                if size:
                    inbound.keep(memoryview(payload)[1:])
                if inbound.collecting:
                    self._grant(payload[0], size)
                if inbound.bounded or not inbound.collecting:
                    self._notify()
                return
        self._feed_sink(self._sink, payload)
        with self._link.lock:
            self._grant(payload[0], size)

    def take_eof(self, payload: bytes) -> None:
        """Accept EOF. The lock is held."""
        self._channel(payload).ended = True
        self._retire_if_over()
        self._notify()

    def take_window(self, payload: bytes) -> None:
        """Accept credit for channel 0. The lock is held."""
        if len(payload) != _GRANT.size or payload[0] != 0:
            raise ProtocolError("a malformed WINDOW")
        self._credit += _GRANT.unpack(payload)[1]
        self._notify()

    def take_close(self, payload: bytes) -> None:
        """Accept CLOSE. The lock is held."""
        if len(payload) != _ERRNO.size:
            raise ProtocolError("a malformed CLOSE")
        self._closed = _ERRNO.unpack(payload)[0]
        self._retire_if_over()
        self._notify()

    def take_exit(self, payload: bytes) -> None:
        """Accept EXIT. The lock is held."""
        if self.kind in (StreamKind.CONNECT, StreamKind.LOGS) or self.kind.is_verb:
            raise ProtocolError(f"EXIT for {self.kind.name}")
        self._exit = decode_fields(payload)
        self._retire_if_over()
        self._notify()

    # Inside; the lock is held unless said

    def _notify(self) -> None:
        """Wake every waiter and schedule the watcher."""
        self._changed.notify_all()
        if self._watcher:
            self._link.schedule(self._watcher)

    def _wait(self, ready: Callable[[], bool], deadline: Deadline, verb: str) -> None:
        link = self._link
        if ready():
            return
        if link.reason is None and not self._abandoned:
            link.check_may_wait()
        wait_on(self._changed, lambda: ready() or self._abandoned or link.reason is not None, deadline)
        if ready():
            return
        if link.reason is not None:
            link.raise_reason()
        if self._abandoned:
            raise GuestError(f"{self.what} was closed by the host")
        raise GuestTimeout(
            f"{self.what} did not {verb} within {deadline}",
            hint="raise this call's timeout, or see the console and the workload log for what the guest was doing",
            evidence=link.evidence(),
        )

    def _failure(self, code: int, message: str) -> CallFailed:
        name = errno.errorcode.get(code, str(code))
        hint = ""
        if code == errno.EAGAIN:
            hint = f"close processes, sockets and copies that are not used: {PROTOCOL_STREAMS_MAX} may be open at once"
        error = CallFailed(f"{self.what} failed in the guest: {message or os.strerror(code)} ({name})", hint=hint)
        error.errno = code
        return error

    def _channel(self, payload: bytes) -> Inbound:
        if not payload or payload[0] >= len(self._inbound):
            raise ProtocolError("a frame for a channel that the stream does not have")
        return self._inbound[payload[0]]

    def _grant(self, channel: int, size: int) -> None:
        """Count consumed bytes, and grant them again once they are half a window."""
        inbound = self._inbound[channel]
        inbound.owed += size
        if inbound.owed * 2 < PROTOCOL_WINDOW or inbound.ended or self._is_over():
            return
        self._link.transmit(encode_frame(FrameType.WINDOW, self.id, _GRANT.pack(channel, inbound.owed)))
        inbound.credit += inbound.owed
        inbound.owed = 0

    def _is_at_end(self, channel: int) -> bool:
        return self._inbound[channel].ended or self._exit is not None or self._closed is not None or self._abandoned

    def _is_write_over(self) -> bool:
        return self._sent_eof or self._is_over()

    def _is_over(self) -> bool:
        """Return whether the stream has ended by the rules of the protocol."""
        if self._exit is not None or self._closed is not None or self._abandoned:
            return True
        if self.kind.is_verb:
            return self._reply is not None
        both = self._sent_eof and self._inbound[0].ended
        return (self.kind is StreamKind.CONNECT and both) or (self.kind is StreamKind.LOGS and self._inbound[0].ended)

    def _retire_if_over(self) -> None:
        if self._is_over():
            self._link.retire(self.id)

    def _feed_sink(self, sink: Sink, payload: bytes) -> None:
        """Pass bytes to the sink. A sink that raises loses its stream; the session goes on. The lock is not held."""
        try:
            sink(payload[1:])
        except Exception as error:  # noqa: BLE001  foreign code, on the session's thread
            self._sink_fault = error
            self.abandon()


def _take(chunks: deque[memoryview], limit: int) -> bytes:
    """Remove and return up to `limit` bytes of the first chunk, or everything for -1."""
    if limit < 0:
        data = b"".join(chunks)
        chunks.clear()
        return data
    first = chunks.popleft()
    if len(first) > limit:
        chunks.appendleft(first[limit:])
    return bytes(first[:limit])
