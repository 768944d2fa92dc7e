"""QEMU's machine protocol (QMP) over one connected socket. The calling thread reads it: no VM has a thread.

QMP is JSON, one message to a line: a greeting, then replies in the order of the commands, with events in between
(https://www.qemu.org/docs/master/interop/qmp-spec.html). Commands are compact: QEMU 7.2 reads its socket byte by byte.
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

__all__ = ["Command", "CommandRefused", "Event", "Monitor", "MonitorGone", "compose"]

_LINE_MAX = 4 << 20
_EVENTS_KEPT = 64

Command = tuple[str, Mapping[str, object]]


class MonitorGone(EngineError):
    """QEMU closed its end: it has ended, or is about to."""


class CommandRefused(EngineError):
    """QEMU answered a command with an error."""


class Event(NamedTuple):
    """An event that QEMU reported."""

    name: str
    data: Mapping[str, object]


class _Pending:
    """A command that was sent. It stays queued when its caller gives up, so that each reply finds its command."""

    def __init__(self, command: str, *, sent_early: bool = False) -> None:
        self.command = command
        self.sent_early = sent_early
        self.answered = False
        self.result: object = None
        self.refusal: str | None = None


def compose(command: str, arguments: Mapping[str, object] | None = None) -> str:
    """Return a command as QMP expects it, in as few bytes as possible."""
    message: dict[str, object] = {"execute": command}
    if arguments:
        message["arguments"] = arguments
    return json.dumps(message, separators=(",", ":"))


class Monitor:
    """The host's end of a QMP connection. Any thread may call any method; one call runs at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._lock = threading.Lock()
        self._input = bytearray()
        self._pending: deque[_Pending] = deque()
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._closed = False

    def send_early(self, commands: Sequence[Command]) -> None:
        """Write commands at once, before QEMU can read them. The next call raises CommandRefused for a refused one."""
        with self._turn(Deadline(10)):
            self._pending.extend(_Pending(command, sent_early=True) for command, _ in commands)
            self._write("".join(compose(command, arguments) for command, arguments in commands), (), Deadline(10))

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout_s: float = 10.0,
        fds: Sequence[int] = (),
    ) -> object:
        """Run one command and return its result. Pass the descriptors `fds` with it.

        Raise CommandRefused with QEMU's message, MonitorGone when QEMU has ended, EngineError at the deadline.
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

    def wait_for_replies(self, timeout_s: float) -> None:
        """Wait until QEMU has answered all commands of `send_early`. Raise EngineError at the deadline."""
        deadline = Deadline(timeout_s)
        with self._turn(deadline):
            self._read_until(lambda: not self._pending, deadline, "start")

    def wait_for_event(self, wanted: Callable[[Event], bool], what: str, timeout_s: float) -> Event:
        """Return the first wanted event, which may have come already. Forget the events before it.

        `what` completes "QEMU did not … within" in the EngineError at the deadline.
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
        """Close the connection and wake the thread that waits on it. Idempotent."""
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
                raise EngineError(f"QEMU's monitor sent a line that is not JSON: {line[:200]!r}") from error
            self._take(message)

    def _read_line(self, deadline: Deadline, what: str) -> bytes:
        while (end := self._input.find(b"\n")) < 0:
            if deadline.expired:
                raise EngineError(f"QEMU did not {what} within {deadline}")
            if len(self._input) > _LINE_MAX:
                raise EngineError(f"QEMU's monitor sent a line of more than {_LINE_MAX >> 20} MiB")
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
            raise EngineError(f"QEMU's monitor sent a line that is not a message: {str(message)[:200]}")
        if "event" in message:
            data = message.get("data")
            self._events.append(Event(str(message["event"]), data if isinstance(data, dict) else {}))
        elif "return" in message or "error" in message:
            self._take_reply(message)
        # Anything else is the greeting. It says the version, which the probe knows.

    def _take_reply(self, message: Mapping[str, object]) -> None:
        if not self._pending:
            raise EngineError("QEMU's monitor sent a reply without a command")
        pending = self._pending.popleft()
        pending.answered, pending.result = True, message.get("return")
        error = message.get("error")
        if error is not None:
            pending.refusal = str(error.get("desc", error)) if isinstance(error, dict) else str(error)
            if pending.sent_early:
                raise CommandRefused(f"QEMU refused {pending.command}: {pending.refusal}")
