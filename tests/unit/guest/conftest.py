"""The fake agent and sessions with it, and a peer whose frames the test writes itself."""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pytest_fcvm.guest.agent import Agent, start_session
from pytest_fcvm.guest.frames import (
    PROTOCOL_BOOT_SECRET,
    PROTOCOL_VERSION,
    FieldTag,
    FieldValue,
    Frame,
    FrameParser,
    FrameType,
    encode_fields,
    encode_frame,
)
from pytest_fcvm.guest.session import Session

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `fakes`

from fakes.agent import FakeAgent


class Peer:
    """The guest's end of a channel, which the test controls."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.hello = b""
        self._parser = FrameParser()
        self._frames: deque[Frame] = deque()
        sock.settimeout(10)

    def read_hello(self) -> None:
        """Read the secret and HELLO."""
        data = b""
        while len(data) < 16 + 9 + 36 + 1:
            data += self.sock.recv(1 << 16)
        self._frames.extend(self._parser.feed(data[16:]))
        self.hello = self._frames.popleft().payload

    def welcome(self, version: int = PROTOCOL_VERSION) -> None:
        """Answer HELLO."""
        self.read_hello()
        self.sock.sendall(self.hello[4:20])
        self.send(FrameType.WELCOME, 0, struct.pack("<I", version) + b"peer")

    def take(self) -> Frame:
        """Return the next frame of the host."""
        while not self._frames:
            data = self.sock.recv(1 << 16)
            assert data, "the host hung up"
            self._frames.extend(self._parser.feed(data))
        return self._frames.popleft()

    def take_all(self, timeout_s: float = 0.2, until: Callable[[deque[Frame]], bool] = lambda _: True) -> list[Frame]:
        """Return the frames of the host: until `until`, and then until the host is silent for `timeout_s`."""
        while not until(self._frames):
            self._frames.extend(self._parser.feed(self.sock.recv(1 << 16)))
        self.sock.settimeout(timeout_s)
        try:
            while data := self.sock.recv(1 << 16):
                self._frames.extend(self._parser.feed(data))
        except TimeoutError:
            pass
        self.sock.settimeout(10)
        frames = list(self._frames)
        self._frames.clear()
        return frames

    def send(self, kind: FrameType, stream: int, payload: bytes = b"") -> None:
        """Send a frame."""
        self.sock.sendall(encode_frame(kind, stream, payload))

    def reply(self, stream: int, *fields: tuple[FieldTag, FieldValue], code: int = 0) -> None:
        """Send REPLY."""
        self.send(FrameType.REPLY, stream, struct.pack("<I", code) + encode_fields(fields))


@pytest.fixture
def cleanup() -> Iterator[ExitStack]:
    """A stack that is unwound after the test. Afterwards no thread of a session or a fake may be left."""
    with ExitStack() as stack:
        yield stack
    left = [thread.name for thread in threading.enumerate() if thread.name in ("fcvm-session", "fake-agent")]
    assert left == []


@pytest.fixture
def fake(cleanup: ExitStack) -> FakeAgent:
    """A fake agent without a channel."""
    return cleanup.enter_context(FakeAgent())


@pytest.fixture
def connect(cleanup: ExitStack, fake: FakeAgent) -> Callable[[], socket.socket]:
    """Return the host's end of a new channel to the fake at every call."""

    def new_channel() -> socket.socket:
        host, guest = socket.socketpair()
        cleanup.callback(host.close)
        fake.attach(guest)
        return host

    return new_channel


@pytest.fixture
def agent(cleanup: ExitStack, connect: Callable[[], socket.socket]) -> Agent:
    """A session with the fake, ready for calls."""
    return cleanup.enter_context(start_session(connect(), PROTOCOL_BOOT_SECRET, timeout_s=10))


@pytest.fixture
def channel_ends(cleanup: ExitStack) -> tuple[socket.socket, socket.socket]:
    """The host's end of a channel, for a session to own, and the guest's end."""
    host, guest = socket.socketpair()
    cleanup.enter_context(guest)
    return host, guest


@pytest.fixture
def peer_and_session(cleanup: ExitStack, channel_ends: tuple[socket.socket, socket.socket]) -> tuple[Peer, Session]:
    """A peer and a session with it that has not been started."""
    host, guest = channel_ends
    return Peer(guest), cleanup.enter_context(Session(host, PROTOCOL_BOOT_SECRET))


@pytest.fixture
def peer_and_agent(peer_and_session: tuple[Peer, Session]) -> tuple[Peer, Agent]:
    """A peer that has sent WELCOME, and the host's agent object."""
    peer, session = peer_and_session
    agent = Agent(session)
    session.start()
    peer.welcome()
    return peer, agent
