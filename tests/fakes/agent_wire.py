"""The fake agent's side of the wire: secret, frames, credit and the order of what it sends.

It follows `guest_image/agent/protocol.h`. It shares only the encoding with the host's code.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import deque
from collections.abc import Coroutine
from typing import Any

from pytest_fcvm.guest.frames import (
    PROTOCOL_BODY_MAX,
    PROTOCOL_HEADER,
    PROTOCOL_PAYLOAD_MAX,
    PROTOCOL_STREAMS_MAX,
    PROTOCOL_VERSION,
    PROTOCOL_WINDOW,
    EventKind,
    Fields,
    FieldTag,
    FieldValue,
    FrameType,
    ProtocolError,
    StreamKind,
    decode_fields,
    encode_fields,
    encode_frame,
)

Body = list[tuple[FieldTag, FieldValue]]
PIECE = 32 * 1024
_HOST_MAY_SEND = {1, 3, 4, 6, 7, 8, 9, 11}


class Violation(Exception):
    """The host broke a rule of the protocol."""


class FakeStream:
    """The agent's end of a stream, which programs get."""

    def __init__(self, agent: Wire, number: int, kind: StreamKind, body_size: int) -> None:
        self.agent, self.id, self.kind = agent, number, kind
        self.body, self.body_size = bytearray(), body_size
        self.fields = Fields()
        self.task: asyncio.Task[None] | None = None
        self.credit = [PROTOCOL_WINDOW, PROTOCOL_WINDOW]  # bytes that the agent may still send
        self.granted = PROTOCOL_WINDOW  # bytes that the host may still send
        self.inbox: deque[bytes] = deque()
        self.eof = False
        self.owed = 0
        self.changed = asyncio.Event()
        self.signals: list[int] = []
        self.catches_signals = False

    @property
    def argv(self) -> list[str]:
        return self.fields.texts(FieldTag.ARG)

    async def read(self) -> bytes:
        """Return what the host sent, b"" after its EOF."""
        while not self.inbox and not self.eof:
            await self.wait_for_change()
        if not self.inbox:
            return b""
        data = self.inbox.popleft()
        self.owed += len(data)
        if self.owed * 2 >= PROTOCOL_WINDOW:
            self.granted += self.owed
            self.agent.control(FrameType.WINDOW, self.id, struct.pack("<BI", 0, self.owed))
            self.owed = 0
        return data

    async def write(self, data: bytes, channel: int = 0) -> None:
        """Send all of `data`, as the host's credit allows."""
        view = memoryview(data)
        while view:
            while not self.credit[channel]:
                await self.wait_for_change()
            piece = view[: min(self.credit[channel], PIECE)]
            self.credit[channel] -= len(piece)
            await self.agent.data(self.id, bytes([channel]) + piece)
            view = view[len(piece) :]

    def write_eof(self, channel: int = 0) -> None:
        self.agent.put_data(encode_frame(FrameType.EOF, self.id, bytes([channel])))

    async def wait_for_change(self) -> None:
        self.changed.clear()
        await self.changed.wait()


class Wire:
    """The agent's end of the channel. Everything runs on the thread of `loop`."""

    def __init__(self, secret: bytes, loop: asyncio.AbstractEventLoop) -> None:
        self.errors: list[str] = []  # reasons that ended sessions
        self.version, self.build_id = PROTOCOL_VERSION, "fake"
        self.bytes_read = 0
        self.executed: list[tuple[StreamKind, Fields]] = []
        self.streams: dict[int, FakeStream] = {}
        self.loop = loop
        self.secret, self._in_session, self._greeted = secret, False, False
        self._tail, self._partial, self._offset = b"", bytearray(), 0
        self._last_id = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._control: deque[bytes] = deque()
        self._data: deque[bytes] = deque()
        self._sending = memoryview(b"")
        self._sock: socket.socket | None = None
        self._room = asyncio.Event()

    async def serve(self, stream: FakeStream) -> None:
        """Serve a stream."""
        raise NotImplementedError

    def after_welcome(self) -> None:
        """Report earlier events to a new session."""

    # The channel

    def take_channel(self, sock: socket.socket, stale: bytes = b"") -> None:
        """Go on with the next host's channel. The agent reads `stale` first, like bytes of an earlier host."""
        self.drop_channel()
        sock.settimeout(0)
        self._sock = sock
        if stale:
            self._control.appendleft(stale)
        self.loop.add_reader(sock, self._readable)
        self._pump()

    def drop_channel(self) -> None:
        if self._sock is not None:
            self.loop.remove_reader(self._sock)
            self.loop.remove_writer(self._sock)
            self._sock.close()
            self._sock = None

    async def finish(self) -> None:
        self.drop_channel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _readable(self) -> None:
        try:
            data = self._sock.recv(1 << 18) if self._sock else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self.feed(data)
        else:
            self.drop_channel()  # the agent ignores that a host has left

    def control(self, kind: FrameType, stream: int, payload: bytes) -> None:
        """Send a frame before data that waits."""
        self.put_control(encode_frame(kind, stream, payload))

    def put_control(self, data: bytes) -> None:
        self._control.append(data)
        self._pump()

    def put_data(self, frame: bytes) -> None:
        self._data.append(frame)
        self._pump()

    async def data(self, stream: int, payload: bytes) -> None:
        """Send DATA once the channel has room, so that queues stay short."""
        while len(self._data) >= 16:
            self._room.clear()
            await self._room.wait()
        self.put_data(encode_frame(FrameType.DATA, stream, payload))

    def _pump(self) -> None:
        while self._sock and (self._sending or self._control or self._data):
            if not self._sending:
                self._sending = memoryview((self._control or self._data).popleft())
            try:
                sent = self._sock.send(self._sending)
            except BlockingIOError:
                self.loop.add_writer(self._sock, self._pump)
                return
            except OSError:
                self.drop_channel()
                return
            self._sending = self._sending[sent:]
            self._room.set()
        if self._sock:
            self.loop.remove_writer(self._sock)

    # Input: secret, frames

    def feed(self, data: bytes) -> None:
        """Read input as the agent does: first look for the secret, then for frames."""
        view, known, hit = memoryview(data), b"", -1
        while view:
            if known != self.secret:
                known, seen = self.secret, self._tail + view
                found = seen.find(known)
                hit = -1 if found < 0 else len(view) - len(seen) + found + len(known)
            used = self._step(view if hit < 0 else view[:hit])
            self._tail = (self._tail + view[:used])[-15:]
            self._offset += used
            view = view[used:]
            hit -= used
            if hit == 0:
                self._begin_session()
                known = b""
        self.bytes_read += len(data)

    def _step(self, view: memoryview) -> int:
        """Take bytes up to the end of one frame at most and return their number."""
        if not self._in_session:
            return len(view)
        frame, start = self._partial, len(self._partial)
        frame += view[: PROTOCOL_HEADER - start] if start < PROTOCOL_HEADER else b""
        if len(frame) < PROTOCOL_HEADER:
            return len(view)
        try:
            length, kind, stream = struct.unpack_from("<IBI", frame)
            if length > PROTOCOL_PAYLOAD_MAX or kind not in _HOST_MAY_SEND:
                raise Violation(f"length {length}, type {kind}")
            used = len(frame) - start
            frame += view[used : used + PROTOCOL_HEADER + length + 1 - len(frame)]
            used = len(frame) - start
            if len(frame) == PROTOCOL_HEADER + length + 1:
                self._partial = bytearray()
                if frame[-1]:
                    raise Violation(f"trailer {frame[-1]}")
                self._take(FrameType(kind), stream, bytes(frame[PROTOCOL_HEADER:-1]))
        except (Violation, ProtocolError, struct.error, ValueError) as error:
            self._refuse(str(error))
            return len(view)
        return used

    def _begin_session(self) -> None:
        self.end_streams()
        self._partial, self._offset, self._last_id = bytearray(), 0, 0
        self._control.clear()
        self._data.clear()
        self._sending = memoryview(b"")
        self._in_session, self._greeted = True, False

    def _refuse(self, text: str) -> None:
        self.errors.append(text)
        self._in_session = False
        self.end_streams()
        self.control(FrameType.ERROR, 0, struct.pack("<Q", self._offset) + text.encode())

    def end_streams(self) -> None:
        for stream in list(self.streams.values()):
            if stream.task and stream.fields.number(FieldTag.FLAGS) != 1:
                stream.task.cancel()
        self.streams.clear()

    def _take(self, kind: FrameType, number: int, payload: bytes) -> None:
        if kind is FrameType.HELLO:
            return self._take_hello(payload)
        if not self._greeted:
            raise Violation("HELLO must come first")
        if kind is FrameType.OPEN:
            return self._take_open(number, payload)
        if number == 0 or number > self._last_id:
            raise Violation(f"stream {number} was never opened")
        stream = self.streams.get(number)
        if stream is None:
            return None  # it has ended
        getattr(self, f"_take_{kind.name.lower()}")(stream, payload)
        stream.changed.set()
        return None

    def _take_hello(self, payload: bytes) -> None:
        version, nonce, self.secret = struct.unpack("<I16s16s", payload)
        if self._greeted or version != PROTOCOL_VERSION or 0 in self.secret:
            raise Violation(f"HELLO again, of version {version} or with a zero in its secret")
        self._greeted = True
        welcome = struct.pack("<I", self.version) + self.build_id.encode()
        self.put_control(nonce + encode_frame(FrameType.WELCOME, 0, welcome))
        self.after_welcome()

    def _take_open(self, number: int, payload: bytes) -> None:
        kind, size = struct.unpack_from("<BI", payload)
        if number <= self._last_id or size > PROTOCOL_BODY_MAX:
            raise Violation(f"OPEN of {number} after {self._last_id} with {size} bytes")
        self._last_id = number
        stream = FakeStream(self, number, StreamKind(kind), size)
        if len(self.streams) >= PROTOCOL_STREAMS_MAX:
            return self.reply(stream, error=(errno.EAGAIN, "too many streams"))
        self.streams[number] = stream
        return self._take_body(stream, payload[5:])

    def _take_body(self, stream: FakeStream, payload: bytes) -> None:
        stream.body += payload
        if stream.task or len(stream.body) > stream.body_size:
            raise Violation("more BODY than announced")
        if len(stream.body) == stream.body_size:
            stream.fields = decode_fields(bytes(stream.body))
            self.executed.append((stream.kind, stream.fields))
            stream.task = self.spawn(self.serve(stream))

    def _take_data(self, stream: FakeStream, payload: bytes) -> None:
        stream.granted -= len(payload) - 1
        if payload[0] != 0 or stream.granted < 0 or stream.eof:
            raise Violation("DATA beyond credit, after EOF or on a wrong channel")
        stream.inbox.append(payload[1:])

    def _take_eof(self, stream: FakeStream, _payload: bytes) -> None:
        stream.eof = True

    def _take_window(self, stream: FakeStream, payload: bytes) -> None:
        channel, size = struct.unpack("<BI", payload)
        stream.credit[channel] += size

    def _take_close(self, stream: FakeStream, _payload: bytes) -> None:
        self.streams.pop(stream.id, None)
        if stream.task:
            stream.task.cancel()

    def _take_signal(self, stream: FakeStream, payload: bytes) -> None:
        stream.signals.append(payload[0])
        if not stream.catches_signals and stream.task:
            stream.task.cancel()

    def spawn(self, deed: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.loop.create_task(deed)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def reply(self, stream: FakeStream, body: Body | None = None, error: tuple[int, str] = (0, "")) -> None:
        """Send REPLY. The stream ends if the request failed or is a verb."""
        code, message = error
        fields: Body = [(FieldTag.MESSAGE, message)] if code else body or []
        self.control(FrameType.REPLY, stream.id, struct.pack("<I", code) + encode_fields(fields))
        if code or stream.kind.is_verb:
            self.streams.pop(stream.id, None)

    def event(self, kind: EventKind, body: Body) -> None:
        if self._greeted and self._in_session:
            self.control(FrameType.EVENT, 0, bytes([kind]) + encode_fields(body))

    def wait_for_secret(self, secret: bytes) -> None:
        """End the session and read nothing before `secret`."""
        self.secret, self._in_session = secret, False
        self.end_streams()
