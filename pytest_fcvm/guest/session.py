"""A session with the agent: a greeting with a secret, then many streams over one byte channel.

One thread per session reads. Any thread may send, and a write never blocks. The session owns the channel, a connected
stream socket. `guest_image/agent/protocol.h` explains sessions and secrets.
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
    """A stream to open. `what` names it in messages. `sink` receives its channel 0 on the session's own thread."""

    kind: StreamKind
    what: str
    fields: Sequence[tuple[FieldTag, FieldValue]] = ()
    sink: Sink | None = None


class Session:
    """A live session. The agent waits for `secret`. Call `start` once; then any method from any thread.

    When the channel ends, `explain` is called on the session's thread for a better reason (how the VMM died).
    `on_event` may be set before `start` and is called on that thread too. `former` are older secrets, oldest first,
    that the agent may still wait for, because a HELLO or QUIESCE that replaces them was never answered.
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
        self._secrets = (*former, secret, self._agreed)  # the agent waits for one of these
        self._hello = encode_greeting(self._secrets, nonce)
        self._sock = sock
        self._explain = explain
        self._outbox = Outbox(sock)
        self._demux = Demultiplexer(self, nonce)
        self._streams: dict[int, Stream] = {}
        self._scheduled: dict[Callable[[], object], None] = {}
        self._last_id = 0
        self._final: Stream | None = None
        self._resume_token: bytes | None = None  # of a session that is suspended, or about to be
        self._suspended = False
        self._resume_id = 0  # of the first stream after that; the next id is of `open_held`
        self._vague = self._closing = False
        self.changed = threading.Condition(self.lock)
        self._thread = ServiceThread(self._run, name="fcvm-session")

    @classmethod
    def resume(cls, sock: socket.socket, lost: Session, *, explain: Explain | None = None) -> Session:
        """Return a session (not started) that follows a lost one, however much the agent had read of that."""
        *former, secret = lost._secrets
        return cls(sock, secret, former=former, explain=explain)

    @property
    def next_secret(self) -> bytes:
        """Return the secret that the agent waits for once it has read everything from this session."""
        return self._secrets[-1]

    def start(self, opening: Sequence[Opening] = ()) -> list[Stream]:
        """Send HELLO and open the first streams in one write. Return the streams without waiting for an answer."""
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

        Nothing else is sent before its reply, and nothing is read after it: the channel must be idle while its VM is
        saved. With a `resume_token`, the session is suspended instead of ended: frames wait for `resume_session`.
        """
        body = encode_fields(opening.fields)
        with self.lock:
            self.raise_reason()
            if self._final is not None or self._suspended:
                raise UsageProblem("the session is being ended already", hint="quiesce a guest from one place")
            stream = self._final = self._new_stream(opening)
            self._resume_token = resume_token
            self._resume_id = self._last_id + 1
            self._last_id += 2  # ids grow, and calls that wait have later ones
            self.transmit(encode_open(stream.id, opening.kind, body))
            self._outbox.hold()
            self._secrets = (*self._secrets, secret)
            return stream

    def resume_session(self, sock: socket.socket, opening: Opening, *, holds: bool = False) -> Stream:
        """Resume a suspended session over the channel that its VM has now. Open a stream ahead of the frames that wait.

        With `holds`, these frames still wait, until `open_held`. Raise why the session ended meanwhile.
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
                undo.pop_all()  # `close` closes it now
                assert self._resume_token is not None
                stream = self._new_stream(opening, self._resume_id)
                self._outbox.move_to(sock, self._resume_token + encode_open(stream.id, stream.kind, body), holds=holds)
                self._outbox.flush()
                self._suspended = False
                self._thread = ServiceThread(self._run, name="fcvm-session")
                self._start_reading()
        return stream

    def open_held(self, opening: Opening) -> Stream:
        """Open a stream ahead of the frames that `resume_session` holds, then send these."""
        body = encode_fields(opening.fields)
        with self.lock:
            self.raise_reason()
            stream = self._new_stream(opening, self._resume_id + 1)
            self._outbox.release(encode_open(stream.id, stream.kind, body))
            self.transmit(b"")
        return stream

    def wait_until_welcome(self, deadline: Deadline) -> str:
        """Wait for the agent's answer and return its build id. Raise GuestTimeout or why the session ended."""
        self.wait_until(lambda: self.build_id is not None, deadline, "the agent did not answer hello")
        return self.build_id or ""

    def wait_until(self, predicate: Callable[[], bool], deadline: Deadline, complaint: str) -> None:
        """Wait for a condition that `changed` notifies. Raise GuestTimeout (`complaint`) or why the session ended."""
        with self.lock:
            if not predicate() and self.reason is None:
                self.check_may_wait()
            wait_on(self.changed, lambda: predicate() or self.reason is not None, deadline)
            if predicate():
                return
            self.raise_reason()
            raise GuestTimeout(
                f"{complaint} within {deadline}",
                hint="see the console and the workload log for how far the guest got",
                evidence=self.evidence(),
            )

    def abort(self, reason: FcvmError) -> None:
        """Fail every pending and later call with `reason`. It replaces only the reason that the channel ended."""
        with self.lock:
            if self._vague:
                self.reason, self._vague = reason, False
            self._end(reason)

    def close(self) -> None:
        """End the session, its thread and its channel; idempotent. A callback may call it too."""
        with self.lock:
            self._closing = True  # if the join is interrupted, the thread releases the channel
            self._end(GuestError("the session with the agent was closed by the host"))
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self.lock:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What streams call; the lock is held

    def transmit(self, frame: bytes) -> None:
        """Send a frame, at once where the channel takes it."""
        self._outbox.put(frame)
        if self._outbox.blocked or threading.current_thread() is self._thread:
            return  # the reading thread sends after it has handled its input
        self._outbox.flush()
        if self._outbox.blocked or self._outbox.fault:
            self.poller.wake()

    def retire(self, stream_id: int) -> None:
        """Forget a stream that has ended; its late frames are ignored."""
        self._streams.pop(stream_id, None)

    def schedule(self, watcher: Callable[[], object]) -> None:
        """Have a watcher called on the session's thread, after the input is handled. The lock is held."""
        self._scheduled[watcher] = None

    def check_may_wait(self) -> None:
        """Raise UsageProblem if the session's own thread is about to wait for itself."""
        if threading.current_thread() is self._thread:
            raise UsageProblem(
                "a callback of the guest's session waits for the guest",
                hint="callbacks run on the thread that reads: do the work on another thread",
            )

    def raise_reason(self) -> None:
        """Raise why the session ended, if it did. Each caller gets a copy: a traceback belongs to one thread."""
        if self.reason is not None:
            raise copy.copy(self.reason)

    def evidence(self) -> Mapping[str, str]:
        """Return the state of the session."""
        return {"session": f"{self._demux.describe()}; {len(self._streams)} streams open"}

    # What the demultiplexer calls

    def find_stream(self, stream_id: int) -> Stream | None:
        """Return the stream or None if it has ended. Raise ProtocolError if it never began. The lock is held."""
        stream = self._streams.get(stream_id)
        if stream is None and stream_id > self._last_id:
            raise ProtocolError(f"stream {stream_id} was never opened")
        return stream

    def take_welcome(self, build_id: str) -> None:
        """Note that the agent has answered, and so waits for the new secret. The lock is held."""
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
            self._end(GuestError("the session ended when the guest was quiesced", hint="start a new session"))
        else:
            self._secrets = self._secrets[:-1]
            self._outbox.release()

    def take_event(self, kind: EventKind, fields: Fields) -> None:
        """Pass on an event. The lock is not held."""
        if self.on_event:
            self.on_event(kind, fields)

    # Inside

    def _new_stream(self, opening: Opening, reserved_id: int = 0) -> Stream:
        self._last_id += not reserved_id
        stream = Stream(self, reserved_id or self._last_id, opening.kind, opening.what, opening.sink)
        self._streams[stream.id] = stream
        return stream

    def _end(self, reason: FcvmError) -> None:
        """End the session for all callers at once; the first reason counts. The lock is held."""
        if self.reason is None:
            self.reason = reason
        self._outbox.clear()
        for stream in self._streams.values():
            stream.wake()
        self.changed.notify_all()
        self.poller.wake()

    def _release(self) -> None:
        """Close the channel. The lock is held."""
        self._sock.close()
        self.poller.close()

    def _call_watchers(self) -> None:
        """Call the watchers of streams that have new input."""
        while self._scheduled:
            watcher, _ = self._scheduled.popitem()
            watcher()

    def _start_reading(self) -> None:
        """Start the thread, or end the session: without a thread no call may wait. The lock is held."""
        try:
            self._thread.start()
        except BaseException:
            self._end(GuestError("the session with the agent cannot start its thread"))
            raise

    def _run(self) -> None:
        try:
            self._read()
        finally:
            if self.reason is not None:
                self.poller.end()
            with self.lock:
                if self._closing:
                    self._release()

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
                hint="see the console and the VMM's log for the cause",
            )
        except Exception as error:  # noqa: BLE001  any error must end the calls that wait
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
                self._call_watchers()
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
