"""The wire protocol between the host and the guest agent.

`guest_image/agent/protocol.h` has the same names and numbers in C and explains them; a test compares the two. No I/O is
done here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from pytest_fcvm.errors import GuestError, UsageProblem
from pytest_fcvm.host.own import os

__all__ = [
    "PROTOCOL_BODY_MAX",
    "PROTOCOL_BOOT_SECRET",
    "PROTOCOL_HEADER",
    "PROTOCOL_PAYLOAD_MAX",
    "PROTOCOL_PORT_NAME",
    "PROTOCOL_SECRET",
    "PROTOCOL_STREAMS_MAX",
    "PROTOCOL_VERSION",
    "PROTOCOL_VSOCK_PORT",
    "PROTOCOL_WINDOW",
    "EventKind",
    "FieldTag",
    "FieldValue",
    "Fields",
    "Frame",
    "FrameParser",
    "FrameType",
    "ProtocolError",
    "StreamKind",
    "decode_fields",
    "encode_fields",
    "encode_frame",
    "encode_greeting",
    "encode_hello",
    "encode_open",
    "new_secret",
]

PROTOCOL_VERSION = 1
PROTOCOL_HEADER = 9
PROTOCOL_PAYLOAD_MAX = 65536
PROTOCOL_BODY_MAX = 1114112
PROTOCOL_WINDOW = 65536
PROTOCOL_SECRET = 16
PROTOCOL_STREAMS_MAX = 16384
PROTOCOL_VSOCK_PORT = 1024
PROTOCOL_BOOT_SECRET = b"fcvm-boot-secret"
PROTOCOL_PORT_NAME = "fcvm.agent"


class FrameType(IntEnum):
    """The type of a frame."""

    HELLO = 1
    WELCOME = 2
    OPEN = 3
    BODY = 4
    REPLY = 5
    DATA = 6
    EOF = 7
    WINDOW = 8
    CLOSE = 9
    EXIT = 10
    SIGNAL = 11
    EVENT = 12
    ERROR = 13
    RESIZE = 14


class StreamKind(IntEnum):
    """What a stream is for. A kind below 32 is a verb: its stream ends with the reply."""

    CONFIGURE = 1
    START = 2
    STATUS = 3
    METRICS = 4
    QUIESCE = 5
    PERSONALISE = 6
    LISTENING = 7
    STOP = 8
    POWEROFF = 9
    SYNC = 10
    FREEZE = 11
    JOIN = 12
    SUSPEND = 13
    EXEC = 32
    CONNECT = 33
    LOGS = 34
    TAR_IN = 35
    TAR_OUT = 36
    ATTACH = 37
    ACCEPT = 38

    @property
    def is_verb(self) -> bool:
        """Say whether the stream ends with its reply."""
        return self < StreamKind.EXEC


class EventKind(IntEnum):
    """What the agent reports without a request."""

    WORKLOAD_EXIT = 1
    OOM = 2


class FieldTag(IntEnum):
    """The meaning of a field in a body."""

    ARG = 1
    ENV = 2
    CWD = 3
    USER = 4
    HOSTNAME = 5
    MACHINE_ID = 6
    BOOT_ID = 7
    MAC = 8
    ADDRESS = 9
    GATEWAY = 10
    DNS = 11
    HOSTS = 12
    ENTROPY = 13
    REALTIME_NS = 14
    UPPER_MIB = 15
    SECRET = 16
    PORT = 17
    PROTO = 18
    SIGNAL = 19
    PATH = 20
    FLAGS = 21
    MESSAGE = 22
    PID = 23
    EXIT_CODE = 24
    EXIT_SIGNAL = 25
    STATE = 26
    METRIC = 27
    ROOT_DEVICE = 28
    INTERFACE = 29
    LISTENING = 30
    OOM_KILLS = 31
    PEER_GATEWAY = 32
    ROWS = 33
    COLUMNS = 34
    UPPER_DEVICE = 35
    RESUME_TOKEN = 36
    VOLUME = 37
    SYSCTL = 38
    ULIMIT = 39
    SHM_MIB = 40


FieldValue = bytes | str | int

_HEADER = struct.Struct("<IBI")
_FIELD = struct.Struct("<HI")
_OPEN = struct.Struct("<BI")
_VERSION = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
_TYPES = {int(kind): kind for kind in FrameType}


class ProtocolError(GuestError):
    """The agent broke the wire protocol. The message names the offset into the session's input."""


class Frame(NamedTuple):
    """One decoded frame."""

    type: FrameType
    stream: int
    payload: bytes


class Fields(dict[int, list[bytes]]):
    """The fields of a body by tag, in their order. A missing or malformed field reads as the default."""

    def number(self, tag: FieldTag, default: int = 0) -> int:
        """Return the first number under `tag`."""
        found = self.find_number(tag)
        return default if found is None else found

    def find_number(self, tag: FieldTag) -> int | None:
        """Return the first number under `tag` or None."""
        values = self.get(tag)
        if not values or len(values[0]) != _NUMBER.size:
            return None
        return int(_NUMBER.unpack(values[0])[0])

    def text(self, tag: FieldTag) -> str:
        """Return the first text under `tag`, untrusted; "" if there is none."""
        return next(iter(self.texts(tag)), "")

    def line(self, tag: FieldTag) -> str:
        """Return the first text under `tag` on one line, for a message."""
        return " ".join(self.text(tag).split())

    def texts(self, tag: FieldTag) -> list[str]:
        """Return all texts under `tag`, untrusted."""
        return [value.decode("utf-8", "surrogateescape") for value in self.get(tag, ())]


class FrameParser:
    """Cuts a byte stream into frames. Offsets count from the parser's first byte."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._offset = 0

    @property
    def offset(self) -> int:
        """Return the offset of the frame that was yielded last, or of the first incomplete one."""
        return self._offset

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Yield the frames that `data` completes. Use the iterator up before the next call.

        Raise ProtocolError at the first malformed byte, after the frames before it. Do not use the parser afterwards.
        """
        pending, start, at = self._pending, self._offset, 0
        pending += data
        try:
            while (end := self._find_end(at)) is not None:
                _, kind, stream = _HEADER.unpack_from(pending, at)
                payload = bytes(memoryview(pending)[at + PROTOCOL_HEADER : end - 1])
                yield Frame(_TYPES[kind], stream, payload)
                at = end
                self._offset = start + at
        finally:
            del pending[:at]

    def _find_end(self, at: int) -> int | None:
        """Return where the frame at `at` ends, None if it is incomplete."""
        pending = self._pending
        if len(pending) - at < PROTOCOL_HEADER:
            return None
        length, kind, _ = _HEADER.unpack_from(pending, at)
        if length > PROTOCOL_PAYLOAD_MAX:
            raise self._malformed(at, 0, f"a payload of {length} bytes")
        if kind not in _TYPES:
            raise self._malformed(at, 4, f"frame type {kind}")
        end = at + PROTOCOL_HEADER + int(length) + 1
        if len(pending) < end:
            return None
        if pending[end - 1]:
            raise self._malformed(at, end - 1 - at, f"a trailer of {pending[end - 1]}")
        return end

    def _malformed(self, at: int, inside: int, what: str) -> ProtocolError:
        near = bytes(self._pending[max(0, at + inside - 32) : at + inside + 32])
        return ProtocolError(
            f"malformed input at offset {self._offset + inside}: {what}",
            hint="the snapshot's agent may be of another version: --fcvm-rebuild",
            evidence={"bytes around the fault": near.hex(" ")},
        )


def encode_frame(kind: FrameType, stream: int, payload: bytes | bytearray | memoryview = b"") -> bytes:
    """Return one frame as bytes."""
    return b"".join((_HEADER.pack(len(payload), kind, stream), payload, b"\0"))


def encode_hello(nonce: bytes, next_secret: bytes) -> bytes:
    """Return the frame that starts a session; it must follow the secret."""
    return encode_frame(FrameType.HELLO, 0, _VERSION.pack(PROTOCOL_VERSION) + nonce + next_secret)


def encode_greeting(secrets: Sequence[bytes], nonce: bytes) -> bytes:
    """Return the bytes that start a session, whichever of `secrets` (but the last) the agent waits for.

    Each HELLO replaces its secret by the next one. An agent that waits for a later secret finds it inside these bytes.
    """
    last = len(secrets) - 2
    return b"".join(
        secrets[i] + encode_hello(nonce if i == last else new_secret(), secrets[i + 1]) for i in range(last + 1)
    )


def encode_open(stream: int, kind: StreamKind, body: bytes) -> bytes:
    """Return the frames that open a stream: OPEN, and as many BODY as necessary."""
    room = PROTOCOL_PAYLOAD_MAX - _OPEN.size
    first = encode_frame(FrameType.OPEN, stream, _OPEN.pack(kind, len(body)) + body[:room])
    if len(body) <= room:
        return first
    parts = (body[at : at + PROTOCOL_PAYLOAD_MAX] for at in range(room, len(body), PROTOCOL_PAYLOAD_MAX))
    return first + b"".join(encode_frame(FrameType.BODY, stream, part) for part in parts)


def encode_fields(fields: Iterable[tuple[FieldTag, FieldValue]]) -> bytes:
    """Return the body of `fields`: numbers as u64, texts as UTF-8 (surrogates as the bytes they stand for).

    Raise UsageProblem for a text with a zero byte, and for a body over PROTOCOL_BODY_MAX.
    """
    parts: list[bytes] = []
    for tag, value in fields:
        data = _encode_value(tag, value)
        parts += (_FIELD.pack(tag, len(data)), data)
    body = b"".join(parts)
    if len(body) > PROTOCOL_BODY_MAX:
        raise UsageProblem(
            f"a request of {len(body)} bytes to the guest is over the limit of {PROTOCOL_BODY_MAX}",
            hint="pass long input on stdin or in a file (copy_in), not as arguments",
        )
    return body


def decode_fields(body: bytes | memoryview) -> Fields:
    """Return the fields of a body. Raise ProtocolError if a length points past the end."""
    fields, at = Fields(), 0
    while at < len(body):
        start = at + _FIELD.size
        tag, length = _FIELD.unpack_from(body, at) if start <= len(body) else (0, len(body))
        at = start + length
        if at > len(body):
            raise ProtocolError(f"malformed fields: {length} bytes announced, {max(0, len(body) - start)} there")
        fields.setdefault(tag, []).append(bytes(body[start:at]))
    return fields


def new_secret() -> bytes:
    """Return 16 random bytes without a zero byte, as the protocol requires of a secret."""
    secret = b""
    while len(secret) < PROTOCOL_SECRET:
        secret += os.urandom(2 * PROTOCOL_SECRET).replace(b"\0", b"")
    return secret[:PROTOCOL_SECRET]


def _encode_value(tag: FieldTag, value: FieldValue) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        data = _NUMBER.pack(value) if isinstance(value, int) else value.encode("utf-8", "surrogateescape")
    except (struct.error, UnicodeEncodeError) as error:
        raise UsageProblem(f"{tag.name} cannot be sent to the guest: {error}", hint="correct the argument") from error
    if isinstance(value, str) and b"\0" in data:
        raise UsageProblem(f"{tag.name} holds a zero byte: {value!r}", hint="remove it: programs cannot take one")
    return data
