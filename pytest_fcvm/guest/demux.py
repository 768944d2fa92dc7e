"""Sorts what the agent sends: drops everything before the nonce, and hands each frame after it to its stream.

The guest is not trusted: input that breaks a rule raises ProtocolError, which ends the session. No I/O is done
here.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from pytest_fcvm.errors import FcvmError, GuestError
from pytest_fcvm.guest.frames import (
    PROTOCOL_VERSION,
    EventKind,
    Fields,
    Frame,
    FrameParser,
    FrameType,
    ProtocolError,
    decode_fields,
)
from pytest_fcvm.guest.streams import Stream

__all__ = ["Demultiplexer", "Hub"]

_STALE_KEPT = 512
_OFFSET = struct.Struct("<Q")
_VERSION = struct.Struct("<I")
_EVENTS = {int(kind): kind for kind in EventKind}


class Hub(Protocol):
    """The part of the session that the demultiplexer uses."""

    lock: threading.Lock
    reason: FcvmError | None

    def find_stream(self, stream_id: int) -> Stream | None:
        """Return the stream or None if it has ended. Raise ProtocolError if it never began. The lock is held."""
        ...

    def take_welcome(self, build_id: str) -> None:
        """Note that the agent has answered. The lock is held."""

    def take_replied(self, stream: Stream, *, succeeded: bool) -> None:
        """Note that a stream has its reply. The lock is held."""

    def take_event(self, kind: EventKind, fields: Fields) -> None:
        """Pass on an event. The lock is not held."""


class Demultiplexer:
    """Takes the bytes of the channel, and calls the hub and the streams."""

    def __init__(self, hub: Hub, nonce: bytes) -> None:
        self._hub = hub
        self._nonce = nonce
        self._stale = bytearray()
        self._stale_count = 0
        self._greeted = False
        self._welcomed = False
        self._parser = FrameParser()

    def feed(self, data: memoryview) -> None:
        """Take the next bytes. Raise ProtocolError that names the offset, counted from the nonce's end."""
        fresh = data if self._greeted else self._skip_to_nonce(data)
        for frame in self._parser.feed(fresh):
            try:
                self._dispatch(frame)
            except ProtocolError as error:
                where = f"in the {frame.type.name} frame at offset {self._parser.offset}"
                raise ProtocolError(f"{error.message}, {where}", hint=error.hint, evidence=error.evidence) from error
            if self._hub.reason is not None:
                return  # ignore frames after the end of the session

    def describe(self) -> str:
        """Return the state of the session, for messages."""
        if self._welcomed:
            return "the agent has answered hello"
        last = bytes(self._stale[-_STALE_KEPT:]).decode("utf-8", "backslashreplace")
        return f"the agent has not answered hello; {self._stale_count} bytes came, the last: {last!r}"

    def _skip_to_nonce(self, data: memoryview) -> bytes:
        """Return the bytes after the nonce, b"" before the nonce has come."""
        stale = self._stale
        stale += data
        self._stale_count += len(data)
        at = stale.find(self._nonce)
        if at < 0:
            del stale[: -_STALE_KEPT - len(self._nonce)]
            return b""
        self._greeted = True
        fresh = bytes(stale[at + len(self._nonce) :])
        stale.clear()
        return fresh

    def _dispatch(self, frame: Frame) -> None:
        if frame.stream == 0:
            self._dispatch_control(frame)
        elif not self._welcomed:
            raise ProtocolError("a frame before WELCOME")
        elif frame.type is FrameType.DATA:
            with self._hub.lock:
                stream = self._hub.find_stream(frame.stream)
            if stream:
                stream.take_data(frame.payload)
        else:
            self._dispatch_to_stream(frame)

    def _dispatch_to_stream(self, frame: Frame) -> None:
        with self._hub.lock:
            stream = self._hub.find_stream(frame.stream)
            if stream is None:
                return
            if frame.type is FrameType.REPLY:
                self._hub.take_replied(stream, succeeded=stream.take_reply(frame.payload))
                return
            handlers: Mapping[FrameType, Callable[[bytes], None]] = {
                FrameType.EOF: stream.take_eof,
                FrameType.WINDOW: stream.take_window,
                FrameType.CLOSE: stream.take_close,
                FrameType.EXIT: stream.take_exit,
            }
            if frame.type not in handlers:
                raise ProtocolError("a frame that only the host may send")
            handlers[frame.type](frame.payload)

    def _dispatch_control(self, frame: Frame) -> None:
        if frame.type is FrameType.WELCOME:
            self._take_welcome(frame.payload)
        elif frame.type is FrameType.EVENT and self._welcomed:
            self._take_event(frame.payload)
        elif frame.type is FrameType.ERROR:
            self._raise_error(frame.payload)
        else:
            raise ProtocolError("a frame that does not belong on stream 0")

    def _take_welcome(self, payload: bytes) -> None:
        if self._welcomed or len(payload) < _VERSION.size:
            raise ProtocolError("a second or short WELCOME")
        (version,) = _VERSION.unpack_from(payload)
        if version != PROTOCOL_VERSION:
            raise GuestError(
                f"the agent in the guest speaks protocol version {version}, this package {PROTOCOL_VERSION}",
                hint="build the snapshot again: --fcvm-rebuild",
            )
        self._welcomed = True
        with self._hub.lock:
            self._hub.take_welcome(payload[_VERSION.size :].decode("utf-8", "backslashreplace"))

    def _take_event(self, payload: bytes) -> None:
        if not payload:
            raise ProtocolError("an empty EVENT")
        kind = _EVENTS.get(payload[0])
        if kind is not None:  # a newer agent may send other events
            self._hub.take_event(kind, decode_fields(payload[1:]))

    def _raise_error(self, payload: bytes) -> None:
        if len(payload) < _OFFSET.size:
            raise ProtocolError("a short ERROR")
        (offset,) = _OFFSET.unpack_from(payload)
        text = payload[_OFFSET.size :].decode("utf-8", "backslashreplace")
        raise GuestError(
            f"the agent refused the input at offset {offset}: {text}",
            hint="the agent may be of another version than this package: --fcvm-rebuild",
        )
