"""QEMU's machine protocol (QMP) over one connected socket, read by whoever asks: no thread waits for a VM.

QMP is JSON, one message to a line: a greeting, then replies in the order of the commands, with events in between
(https://www.qemu.org/docs/master/interop/qmp-spec.html). QEMU 7.2 reads its socket byte by byte: commands are compact.
"""

from __future__ import annotations

import json
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from pytest_fcvm.errors import EngineError
from pytest_fcvm.host.clock import Deadline

__all__ = ["CommandRefused", "Event", "Monitor", "MonitorGone", "compose"]

_LINE_MAX = 4 << 20
_EVENTS_KEPT = 64


class MonitorGone(EngineError):
    """The other end closed: the VMM has ended, or is about to."""


class CommandRefused(EngineError):
    """QEMU answered a command with an error."""


class Event(NamedTuple):
    """Something that QEMU said unasked."""

    name: str
    data: Mapping[str, object]


class _Pending:
    """A command that was sent. It stays in the queue when its caller gives up, so that replies find their commands."""

    def __init__(self, command: str, *, prewarmed: bool = False) -> None:
        self.command = command
        self.prewarmed = prewarmed
        self.answered = False
        self.result: object = None
        self.refusal: str | None = None


def compose(command: str, arguments: Mapping[str, object] | None = None) -> str:
    """Return a command as QMP takes it, in as few bytes as can be."""
    message: dict[str, object] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message, separators=(",", ":"))


class Monitor:
    """The host's end of a QMP connection. Every method may be called from any thread; they take turns."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._input = bytearray()
        self._pending: deque[_Pending] = deque()
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._closed = False

    def send_ahead(self, commands: Sequence[tuple[str, Mapping[str, object]]]) -> None:
        """Write commands in one go, before the VMM is there to read them. The next call raises what was refused."""
        with self._turn(Deadline(10)):
            self._pending.extend(_Pending(command, prewarmed=True) for command, _ in commands)
            self._write("".join(compose(command, arguments) for command, arguments in commands), (), Deadline(10))

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = 10.0,
        fds: Sequence[int] = (),
    ) -> object:
        """Run one command and return what it returns; `fds` travel with it.

        Raise CommandRefused with QEMU's words, MonitorGone at its end, EngineError at the deadline.
        """
        deadline = Deadline(timeout_s)
        with self._turn(deadline):
            pending = _Pending(command)
            self._pending.append(pending)
            self._write(compose(command, arguments), fds, deadline)
            self._read_until(lambda: pending.answered, deadline, f"answer {command}")
        if pending.refusal is not None:
            raise CommandRefused(f"QEMU refused {command}: {pending.refusal}")
        return pending.result

    def settle(self, timeout_s: float) -> None:
        """Wait until everything sent ahead has been answered."""
        deadline = Deadline(timeout_s)
        with self._turn(deadline):
            self._read_until(lambda: not self._pending, deadline, "start")

    def wait_for_event(self, wanted: Callable[[Event], bool], what: str, timeout_s: float) -> Event:
        """Return the first event that is wanted, also one that came earlier, and forget those before it.

        `what` completes "QEMU did not … within" for the error at the deadline.
        """
        deadline = Deadline(timeout_s)
        with self._turn(deadline):
            while True:
                while self._events:
                    event = self._events.popleft()
                    if wanted(event):
                        return event
                self._read_until(lambda: bool(self._events), deadline, what)

    def close(self) -> None:
        """Close the connection and wake whoever waits on it; idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._closed = True
            self._socket.close()

    @contextmanager
    def _turn(self, deadline: Deadline) -> Iterator[None]:
        if not self._lock.acquire(timeout=deadline.remaining() or 0):
            raise EngineError(f"QEMU's monitor was busy for {deadline}")
        try:
            if self._closed:
                raise MonitorGone("the VM has ended")
            yield
        finally:
            self._lock.release()

    def _write(self, text: str, fds: Sequence[int], deadline: Deadline) -> None:
        try:
            self._socket.settimeout(deadline.remaining())
            if fds:
                socket.send_fds(self._socket, [text.encode()], fds)
            else:
                self._socket.sendall(text.encode())
        except (TimeoutError, BlockingIOError) as error:
            raise EngineError(f"QEMU did not read its monitor within {deadline}") from error
        except OSError as error:
            raise MonitorGone("the VM has ended") from error

    def _read_until(self, done: Callable[[], bool], deadline: Deadline, what: str) -> None:
        while not done():
            line = self._read_line(deadline, what)
            try:
                message = json.loads(line)
            except ValueError as error:
                raise EngineError(f"QEMU's monitor sent what is not JSON: {line[:200]!r}") from error
            self._take(message)

    def _read_line(self, deadline: Deadline, what: str) -> bytes:
        while (end := self._input.find(b"\n")) < 0:
            if deadline.expired:
                raise EngineError(f"QEMU did not {what} within {deadline}")
            if len(self._input) > _LINE_MAX:
                raise EngineError("QEMU's monitor sent a line without end")
            self._input += self._read_some(deadline)
        line = bytes(self._input[:end])
        del self._input[: end + 1]
        return line

    def _read_some(self, deadline: Deadline) -> bytes:
        try:
            self._socket.settimeout(deadline.remaining())
            data = self._socket.recv(65536)
        except (TimeoutError, BlockingIOError):  # a timeout of 0 makes the socket non-blocking
            return b""
        except OSError as error:
            raise MonitorGone("the VM has ended") from error
        if not data:
            raise MonitorGone("the VM has ended")
        return data

    def _take(self, message: object) -> None:
        if not isinstance(message, dict):
            raise EngineError(f"QEMU's monitor sent what is not a message: {str(message)[:200]}")
        if "event" in message:
            data = message.get("data")
            self._events.append(Event(str(message["event"]), data if isinstance(data, dict) else {}))
        elif "return" in message or "error" in message:
            self._settle_one(message)
        # What is left is the greeting: it says the version, which the probe knows already.

    def _settle_one(self, message: Mapping[str, object]) -> None:
        if not self._pending:
            raise EngineError("QEMU's monitor answered what nobody asked")
        pending = self._pending.popleft()
        pending.answered, pending.result = True, message.get("return")
        error = message.get("error")
        if error is not None:
            pending.refusal = str(error.get("desc", error)) if isinstance(error, dict) else str(error)
            if pending.prewarmed:
                raise CommandRefused(f"QEMU refused {pending.command}: {pending.refusal}")
