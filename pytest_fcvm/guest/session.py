"""A session with the agent: hello by secret, then many streams over one byte channel.

One thread per session reads; anybody may send, and nobody blocks in a write. The channel is a connected stream socket
that the session owns from then on. Sessions and secrets are explained in `guest_image/agent/protocol.h`.
"""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from pytest_fcvm.errors import FcvmError, GuestError, GuestTimeout, UsageProblem
from pytest_fcvm.guest.demux import Demultiplexer
from pytest_fcvm.guest.frames import (
    EventKind,
    Fields,
    FieldTag,
    FieldValue,
    ProtocolError,
    StreamKind,
    encode_fields,
    encode_greeting,
    encode_open,
    new_secret,
)
from pytest_fcvm.guest.outbox import Outbox
from pytest_fcvm.guest.poller import Poller
from pytest_fcvm.guest.streams import Sink, Stream
from pytest_fcvm.host.clock import Deadline, wait_on
from pytest_fcvm.host.threads import ServiceThread

__all__ = ["Explain", "OnEvent", "Opening", "Session"]

Explain = Callable[[], FcvmError | None]
OnEvent = Callable[[EventKind, Fields], None]

_RECEIVE_BYTES = 256 * 1024


class _ChannelEnded(Exception):
    """The other end of the channel is gone."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A stream to open. `what` names it in messages; `sink` receives its channel 0 on the session's own thread."""

    kind: StreamKind
    what: str
    fields: Sequence[tuple[FieldTag, FieldValue]] = ()
    sink: Sink | None = None


class Session:
    """A live session. `secret` is what the agent waits for. Call `start` once; then any method from any thread.

    `explain` is asked, on the session's thread, for a better reason when the channel ends (how the VMM died).
    `on_event` may be set before `start` and is called on that thread too. `former` are older secrets, oldest first,
    that the agent may still wait for, because a hello or quiesce that replaces them was never answered.
    """

    def __init__(
        self,
        sock: socket.socket,
        secret: bytes,
        *,
        former: Sequence[bytes] = (),
        explain: Explain | None = None,
    ) -> None:
        try:
            self.poller = Poller(sock)
        except OSError:
            sock.close()
            raise
        sock.setblocking(False)  # noqa: FBT003  the socket's own signature
        nonce = new_secret()
        self.lock = threading.Lock()
        self.reason: FcvmError | None = None
        self.last_secret = secret
        self.build_id: str | None = None
        self.on_event: OnEvent | None = None
        self._agreed = new_secret()
        self._secrets = (*former, secret, self._agreed)  # one of these the agent waits for next
        self._hello = encode_greeting(self._secrets, nonce)
        self._sock = sock
        self._explain = explain
        self._outbox = Outbox(sock)
        self._demux = Demultiplexer(self, nonce)
        self._streams: dict[int, Stream] = {}
        self._noted: dict[Callable[[], object], None] = {}
        self._last_id = 0
        self._final: Stream | None = None
        self._resume_token: bytes | None = None  # of a session that is to be parked, or is
        self._suspended = False
        self._return_id = 0  # of the stream that is to be the first then, ahead of one more
        self._vague = self._closing = False
        self.changed = threading.Condition(self.lock)
        self._thread = ServiceThread(self._run, name="fcvm-session")

    @classmethod
    def resume(cls, sock: socket.socket, lost: Session, *, explain: Explain | None = None) -> Session:
        """Return a session (not started) that follows a lost one, whatever the agent had read of the lost one."""
        *former, secret = lost._secrets
        return cls(sock, secret, former=former, explain=explain)

    @property
    def next_secret(self) -> bytes:
        """Return what the agent waits for when it has read all that this session sent."""
        return self._secrets[-1]

    def start(self, opening: Sequence[Opening] = ()) -> list[Stream]:
        """Say hello and open the first streams, all in one write; return the streams without waiting for an answer."""
        bodies = [encode_fields(item.fields) for item in opening]
        with self.lock:
            streams = [self._new_stream(item) for item in opening]
            opens = (encode_open(stream.id, stream.kind, body) for stream, body in zip(streams, bodies, strict=True))
            self._outbox.put(b"".join((self._hello, *opens)))
            self._outbox.flush()
        self._thread.start()
        return streams

    def open(self, opening: Opening) -> Stream:
        """Open a stream and return without waiting for its reply."""
        body = encode_fields(opening.fields)
        with self.lock:
            self.raise_reason()
            stream = self._new_stream(opening)
            self.transmit(encode_open(stream.id, stream.kind, body))
            return stream

    def open_last(self, opening: Opening, secret: bytes, resume_token: bytes | None = None) -> Stream:
        """Open the stream that ends the session when it succeeds; the agent then waits for `secret`.

        Nothing else is sent until its reply, and nothing is read after it: the channel must rest while its VM is saved.
        With a `resume_token`, the session does not end but is parked: what is sent waits for `resume_session`.
        """
        body = encode_fields(opening.fields)
        with self.lock:
            self.raise_reason()
            if self._final is not None or self._suspended:
                raise UsageProblem("the session is being ended already", hint="quiesce a guest from one place")
            stream = self._final = self._new_stream(opening)
            self._resume_token = resume_token
            self._return_id = self._last_id + 1
            self._last_id += 2  # ids grow, and calls that wait have later ones
            self.transmit(encode_open(stream.id, opening.kind, body))
            self._outbox.hold()
            self._secrets = (*self._secrets, secret)
            return stream

    def resume_session(self, sock: socket.socket, opening: Opening, *, holds: bool = False) -> Stream:
        """Go on with a parked session over the channel that its VM has now; open a stream ahead of all that waits.

        Where it `holds`, all that goes on waiting for `open_held`. Raise why the session ended meanwhile.
        """
        with ExitStack() as undo:
            undo.callback(sock.close)
            body = encode_fields(opening.fields)
            self._thread.join()
            sock.setblocking(False)  # noqa: FBT003  the socket's own signature
            with self.lock:
                self.raise_reason()
                self.poller.forget_channel()
                self._sock.close()
                self._sock = sock
                self.poller.use_channel(sock)
                undo.pop_all()  # `close` has it now
                assert self._resume_token is not None
                stream = self._new_stream(opening, self._return_id)
                self._outbox.move_to(sock, self._resume_token + encode_open(stream.id, stream.kind, body), holds=holds)
                self._outbox.flush()
                self._suspended = False
                self._thread = ServiceThread(self._run, name="fcvm-session")
                self._start_reading()
        return stream

    def open_held(self, opening: Opening) -> Stream:
        """Open a stream ahead of what `resume_session` holds, and let that go."""
        body = encode_fields(opening.fields)
        with self.lock:
            self.raise_reason()
            stream = self._new_stream(opening, self._return_id + 1)
            self._outbox.release(encode_open(stream.id, stream.kind, body))
            self.transmit(b"")
        return stream

    def wait_until_welcome(self, deadline: Deadline) -> str:
        """Return the agent's build id once it has answered. Raise GuestTimeout or why the session ended."""
        self.wait_until(lambda: self.build_id is not None, deadline, "the agent did not answer hello")
        return self.build_id or ""

    def wait_until(self, predicate: Callable[[], bool], deadline: Deadline, complaint: str) -> None:
        """Wait for something that `changed` tells of. Raise GuestTimeout (`complaint`) or why the session ended."""
        with self.lock:
            if not predicate() and self.reason is None:
                self.check_may_wait()
            wait_on(self.changed, lambda: predicate() or self.reason is not None, deadline)
            if predicate():
                return
            self.raise_reason()
            raise GuestTimeout(
                f"{complaint} within {deadline}",
                hint="see the console and the workload log for how far the guest has come",
                evidence=self.evidence(),
            )

    def abort(self, reason: FcvmError) -> None:
        """Fail every pending and later call with `reason`. It replaces "the channel ended", and nothing more exact."""
        with self.lock:
            if self._vague:
                self.reason, self._vague = reason, False
            self._end(reason)

    def close(self) -> None:
        """End the session, its thread and its channel; idempotent. A callback may call it as well."""
        with self.lock:
            self._closing = True  # when the wait is interrupted, the thread gives back what it still uses
            self._end(GuestError("the session with the agent was closed by the host"))
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self.lock:
            self._give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What streams call; the lock is held

    def transmit(self, frame: bytes) -> None:
        """Send a frame, at once where the channel takes it."""
        self._outbox.put(frame)
        if self._outbox.blocked or threading.current_thread() is self._thread:
            return  # the reading thread sends when it has dealt with what it received
        self._outbox.flush()
        if self._outbox.blocked or self._outbox.fault:
            self.poller.wake()

    def retire(self, stream_id: int) -> None:
        """Forget a stream that has ended; its late frames are ignored."""
        self._streams.pop(stream_id, None)

    def note(self, watcher: Callable[[], object]) -> None:
        """Let a watcher be called, on the session's thread, when all that has come is dealt with. The lock is held."""
        self._noted[watcher] = None

    def check_may_wait(self) -> None:
        """Raise UsageProblem when the session's own thread is about to wait for itself."""
        if threading.current_thread() is self._thread:
            raise UsageProblem(
                "a callback of the guest's session waits for the guest",
                hint="callbacks run on the thread that reads; hand the work to another one",
            )

    def raise_reason(self) -> None:
        """Raise why the session ended, if it did: a copy per caller, for a traceback belongs to one thread."""
        if self.reason is not None:
            raise copy.copy(self.reason)

    def evidence(self) -> Mapping[str, str]:
        """Return how far the session has come."""
        return {"session": f"{self._demux.describe()}; {len(self._streams)} streams open"}

    # What the demultiplexer calls

    def find_stream(self, stream_id: int) -> Stream | None:
        """Return the stream or None if it has ended. Raise ProtocolError if it never began. The lock is held."""
        stream = self._streams.get(stream_id)
        if stream is None and stream_id > self._last_id:
            raise ProtocolError(f"stream {stream_id} was never opened")
        return stream

    def take_welcome(self, build_id: str) -> None:
        """Note that the agent has answered, and so has taken the new secret. The lock is held."""
        self.build_id = build_id
        self._secrets = self._secrets[self._secrets.index(self._agreed) :]
        self.changed.notify_all()

    def take_replied(self, stream: Stream, *, succeeded: bool) -> None:
        """Note that a stream has its reply. The lock is held."""
        if stream is not self._final:
            return
        self._final = None
        if succeeded:
            self._secrets = self._secrets[-1:]
            if self._resume_token is not None:
                self._suspended = True
                return
            self._end(GuestError("the session ended when the guest was made quiet", hint="start a new session"))
        else:
            self._secrets = self._secrets[:-1]
            self._outbox.release()

    def take_event(self, kind: EventKind, fields: Fields) -> None:
        """Hand on an event. The lock is not held."""
        if self.on_event:
            self.on_event(kind, fields)

    # Inside

    def _new_stream(self, opening: Opening, reserved_id: int = 0) -> Stream:
        self._last_id += not reserved_id
        stream = Stream(self, reserved_id or self._last_id, opening.kind, opening.what, opening.sink)
        self._streams[stream.id] = stream
        return stream

    def _end(self, reason: FcvmError) -> None:
        """End the session for everybody at once; the first reason counts. The lock is held."""
        if self.reason is None:
            self.reason = reason
        self._outbox.clear()
        for stream in self._streams.values():
            stream.wake()
        self.changed.notify_all()
        self.poller.wake()

    def _give_back(self) -> None:
        """Close the channel. The lock is held."""
        self._sock.close()
        self.poller.close()

    def _tell_watchers(self) -> None:
        """Call who watches streams to which something has come."""
        while self._noted:
            watcher, _ = self._noted.popitem()
            watcher()

    def _start_reading(self) -> None:
        """Start the thread. The lock is held; without a thread, nobody may wait for an answer."""
        try:
            self._thread.start()
        except BaseException:
            self._end(GuestError("the session with the agent has no thread to read it"))
            raise

    def _run(self) -> None:
        try:
            self._read()
        finally:
            if self.reason is not None:
                self.poller.end()
            with self.lock:
                if self._closing:
                    self._give_back()

    def _read(self) -> None:
        vague = False
        try:
            self._read_until_end()
        except FcvmError as error:
            reason = error
        except _ChannelEnded as error:
            better = self._explain() if self._explain else None
            vague = better is None
            reason = better or GuestError(
                f"the channel to the agent ended: {error}",
                hint="see the console and the VMM's log for what became of it",
            )
        except Exception as error:  # noqa: BLE001  whatever it was, nobody may be left waiting
            reason = GuestError(f"the session with the agent failed: {type(error).__name__}: {error}")
        else:
            return
        with self.lock:
            self._vague = vague and self.reason is None
            self._end(reason)

    def _read_until_end(self) -> None:
        view = memoryview(bytearray(_RECEIVE_BYTES))
        while self.reason is None and not self._suspended:
            fault = self._outbox.fault
            ready = self.poller.wait(writes=self._outbox.blocked, at_once=fault is not None)
            if self.reason is None and ready:
                self._receive(view)
                self._tell_watchers()
            elif fault:
                raise _ChannelEnded(str(fault))
            with self.lock:
                if self.reason is None and not self._suspended:
                    self._outbox.flush()

    def _receive(self, view: memoryview) -> None:
        try:
            count = self._sock.recv_into(view)
        except BlockingIOError:
            return  # it was writable, not readable
        except OSError as error:
            raise _ChannelEnded(str(error)) from error
        if not count:
            raise _ChannelEnded("end of file")
        self._demux.feed(view[:count])
