"""A small host for the agent's protocol, written from guest_image/agent/protocol.h alone."""

import os
import select
import socket
import struct
import time
from collections import defaultdict
from itertools import count

BOOT_SECRET = b"fcvm-boot-secret"
WINDOW = 65536
HELLO, WELCOME, OPEN, BODY, REPLY, DATA, EOF, GRANT, CLOSE, EXIT, SIGNAL, EVENT, ERROR, RESIZE = range(1, 15)
CONFIGURE, START, STATUS, METRICS, QUIESCE, PERSONALISE, LISTENING, STOP, POWEROFF, SYNC, FREEZE, JOIN, SUSPEND = range(
    1, 14
)
EXEC, CONNECT, LOGS, TAR_IN, TAR_OUT, ATTACH, ACCEPT = range(32, 39)
(ARG, ENV, CWD, USER, HOSTNAME, MACHINE_ID, BOOT_ID, MAC, ADDRESS, GATEWAY, DNS, HOSTS, ENTROPY, REALTIME_NS, UPPER_MIB,
 SECRET, PORT, PROTO, SIGNAL_FIELD, PATH, FLAGS, MESSAGE, PID, EXIT_CODE, EXIT_SIGNAL, STATE, METRIC, ROOT_DEVICE,
 INTERFACE, LISTENING_FIELD, OOM_KILLS, PEER_GATEWAY, ROWS, COLUMNS, UPPER_DEVICE, RESUME_TOKEN, VOLUME, SYSCTL, ULIMIT,
 SHM_MIB) = range(1, 41)  # fmt: skip
NUMBERS = {REALTIME_NS, UPPER_MIB, PORT, SIGNAL_FIELD, FLAGS, PID, EXIT_CODE, EXIT_SIGNAL, LISTENING_FIELD, OOM_KILLS}
NUMBERS |= {PEER_GATEWAY, ROWS, COLUMNS, SHM_MIB}


def frame(kind, stream, payload=b""):
    return struct.pack("<IBI", len(payload), kind, stream) + payload + b"\0"


def fields(items):
    body = b""
    for tag, value in items:
        data = (
            struct.pack("<Q", value) if isinstance(value, int) else value.encode() if isinstance(value, str) else value
        )
        body += struct.pack("<HI", tag, len(data)) + data
    return body


def parse_fields(body):
    found = defaultdict(list)
    while body:
        tag, length = struct.unpack_from("<HI", body)
        data, body = body[6 : 6 + length], body[6 + length :]
        found[tag].append(struct.unpack("<Q", data)[0] if tag in NUMBERS else data.decode("utf-8", "replace"))
    return found


def new_secret():
    return os.urandom(16).replace(b"\0", b"x")


class SessionError(Exception):
    """The agent sent ERROR."""


class Stream:
    """The input of one stream. With `grants` the client renews the agent's credit."""

    def __init__(self, number, grants=True):
        self.number, self.grants = number, grants
        self.reply = self.exit = self.close = None
        self.data = {0: bytearray(), 1: bytearray()}
        self.eof = set()
        self.credit = WINDOW

    @property
    def message(self):
        return (self.exit or self.reply[1])[MESSAGE][0]

    @property
    def code(self):
        return self.exit[EXIT_CODE][0]


class Client:
    """One session over a socket, which other sessions may use before and after."""

    def __init__(self, channel, secret=BOOT_SECRET):
        self.channel = channel
        self.buffer = bytearray()
        self.streams = {}
        self.events = []
        self.numbers = count(1)
        self.next_secret = new_secret()
        nonce = os.urandom(16)
        self.sent = -len(secret)  # bytes of this session
        self.send(secret + frame(HELLO, 0, struct.pack("<I", 1) + nonce + self.next_secret))
        self.wait(lambda: nonce in self.buffer, parse=False)
        del self.buffer[: self.buffer.index(nonce) + 16]
        self.welcome = None
        self.wait(lambda: self.welcome)

    def send(self, data):
        """Write all of it, and read what arrives meanwhile."""
        view = memoryview(data)
        while view:
            readable, writable, _ = select.select([self.channel], [self.channel], [], 20)
            if readable:
                self.receive()
            if writable:
                put = self.channel.send(view[:65536])
                self.sent += put
                view = view[put:]

    def receive(self):
        self.buffer += self.channel.recv(1 << 20)

    def wait(self, done, timeout=20, parse=True):
        deadline = time.monotonic() + timeout
        while True:
            if parse:
                self.parse()
            if done():
                return
            left = deadline - time.monotonic()
            assert left > 0, "the agent did not answer in time"
            if select.select([self.channel], [], [], left)[0]:
                self.receive()

    def parse(self):
        start = 0
        while len(self.buffer) - start >= 10:
            length, kind, number = struct.unpack_from("<IBI", self.buffer, start)
            end = start + 10 + length
            if len(self.buffer) < end:
                break
            assert self.buffer[end - 1] == 0
            self.take(kind, number, bytes(self.buffer[start + 9 : end - 1]))
            start = end
        del self.buffer[:start]

    def take(self, kind, number, payload):  # noqa: C901
        stream = self.streams.get(number)
        if kind == WELCOME:
            self.welcome = payload
        elif kind == ERROR:
            raise SessionError(struct.unpack_from("<Q", payload)[0], payload[8:].decode())
        elif kind == EVENT:
            self.events.append((payload[0], parse_fields(payload[1:])))
        elif kind == REPLY:
            stream.reply = (struct.unpack_from("<I", payload)[0], parse_fields(payload[4:]))
        elif kind == DATA:
            stream.data[payload[0]] += payload[1:]
            if stream.grants:
                self.send(frame(GRANT, number, payload[:1] + struct.pack("<I", len(payload) - 1)))
        elif kind == EOF:
            stream.eof.add(payload[0])
        elif kind == GRANT:
            stream.credit += struct.unpack_from("<I", payload, 1)[0]
        elif kind == CLOSE:
            stream.close = struct.unpack("<I", payload)[0]
        elif kind == EXIT:
            stream.exit = parse_fields(payload)

    def open(self, kind, *items, grants=True):
        stream = Stream(next(self.numbers), grants)
        self.streams[stream.number] = stream
        body = fields(items)
        data = frame(OPEN, stream.number, bytes([kind]) + struct.pack("<I", len(body)) + body[:60000])
        for start in range(60000, len(body), 60000):
            data += frame(BODY, stream.number, body[start : start + 60000])
        self.send(data)
        return stream

    def call(self, kind, *items):
        """Open, await the reply and return its fields; an errno is an OSError."""
        stream = self.open(kind, *items)
        self.wait(lambda: stream.reply)
        if stream.reply[0]:
            raise OSError(stream.reply[0], stream.message)
        return stream.reply[1]

    def write(self, stream, data):
        view = memoryview(data)
        while view:
            self.wait(lambda: stream.credit or stream.exit or stream.close is not None)
            if not stream.credit:
                return
            portion = view[: min(stream.credit, 60000)]
            stream.credit -= len(portion)
            self.send(frame(DATA, stream.number, b"\0" + bytes(portion)))
            view = view[len(portion) :]

    def end_input(self, stream):
        self.send(frame(EOF, stream.number, b"\0"))

    def start_exec(self, *argv, extra=(), grants=True):
        stream = self.open(EXEC, *((ARG, part) for part in argv), *extra, grants=grants)
        self.wait(lambda: stream.reply)
        if stream.reply[0]:
            raise OSError(stream.reply[0], stream.message)
        return stream

    def run(self, *argv, stdin=b"", extra=(), timeout=20):
        """Run a program to its end; the stream has code, data and message."""
        stream = self.start_exec(*argv, extra=extra)
        self.write(stream, stdin)
        if stream.exit is None:
            self.end_input(stream)
        self.wait(lambda: stream.exit is not None, timeout)
        return stream


def channel_pair():
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
